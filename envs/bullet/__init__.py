"""The worlds in PyBullet: the same URDF, the same joint targets, the software renderer that needs no OpenGL."""
