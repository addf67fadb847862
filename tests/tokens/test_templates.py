from __future__ import annotations

import pytest

from emu_embodied.tokens.templates import IMAGE, TASKS, prompts


@pytest.mark.parametrize("task", ["t2i", "x2i", "story", "explore", "vla"])
def test_released_words_without_images(task):
    made = prompts(task, "Draw {a} cat")
    want = f"<|extra_203|>You are a helpful assistant for {task} task. USER: Draw {{a}} cat ASSISTANT: <|extra_100|>"
    assert made.full == want
    assert made.no_text == made.nothing == "<|extra_203|>You are a helpful assistant. USER:  ASSISTANT: <|extra_100|>"


@pytest.mark.parametrize("task", ["t2i", "story", "explore", "vla"])
def test_images_stand_behind_the_question(task):
    made = prompts(task.upper(), "Go on", images=2)
    start = f"<|extra_203|>You are a helpful assistant for {task} task. USER: "
    assert made.full == f"{start}Go on{IMAGE}{IMAGE} ASSISTANT: <|extra_100|>"
    assert made.no_text == f"<|extra_203|>You are a helpful assistant. USER: {IMAGE}{IMAGE} ASSISTANT: <|extra_100|>"
    assert IMAGE not in made.nothing and not made.sparse


def test_editing_has_images_before_the_question():
    assert f"USER: {IMAGE}Make it red ASSISTANT:" in prompts("x2i", "Make it red", images=1).full


def test_guidance_asks_for_both_and_for_steps():
    made = prompts("howto", "Boil an egg.", steps=4)
    assert made.full == (
        "<|extra_203|>You are a helpful assistant for howto task. Please generate a response with interleaved text and "
        "images. USER: Boil an egg. Please provide 4 steps for the task. ASSISTANT: <|extra_100|>"
    )


def test_subtask_planning():
    made = prompts("subtasks", "put it in the bag.", images=2, steps=6, arm="AgiBot G1")
    start = (
        "<|extra_203|>You are a helpful assistant for embodied subtask planning. You are given a task instruction and "
        "the initial observation. Your task is to predict the interleaved subtask and observation to finish the task. "
        "Robot Arm Type: AgiBot G1."
    )
    end = f"Finish the task with 6 steps.\n{IMAGE}\n{IMAGE}\n<|extra_100|>"
    assert made.full == f"{start} Instruction: put it in the bag. {end}"
    assert made.no_text == f"{start}{IMAGE}{IMAGE}<|extra_100|>" and made.sparse


@pytest.mark.parametrize(
    "task, question, steps, fault",
    [
        ("vlaa", "x", None, "did you mean vla"),
        ("t2i", "  ", None, "the prompt is empty"),
        ("t2i", f"a {IMAGE}", None, "leave it out"),
        ("howto", "x", 0, "at least 1"),
    ],
)
def test_bad_questions(task, question, steps, fault):
    with pytest.raises(ValueError, match=fault):
        prompts(task, question, steps=steps)


def test_every_task_has_its_prompt():
    assert all(prompts(task, "question", images=1).full.count(IMAGE) == 1 for task in TASKS)
