#!/bin/sh
# Usage: models.sh [-n] BIN MODEL...
# Makes shipped checkpoints from nothing, each in runs/models/MODEL, with the programs in the folder BIN. What is finished
# is not done again; a command that was interrupted goes on. -n prints the commands instead.
# Every recipe names the time and the machine it took; a faster machine sees more steps in the same minutes.
set -eu
dry=
if [ "$1" = -n ]; then
    dry=1
    shift
fi
bin=$1
shift

# run NAME ARGUMENTS...: an emu-embodied command of the model, once.
run() {
    done=$out/.done/$1
    shift
    if [ -n "$dry" ]; then
        echo "emu-embodied $*"
    elif [ ! -e "$done" ]; then
        echo "+ emu-embodied $*"
        "$bin/emu-embodied" "$@"
        mkdir -p "$out/.done"
        touch "$done"
    fi
}

# Times are those of one core of a 2.5 GHz Xeon without matrix units, mostly shared with other work.

# Reach, push: what pictures look like. 8 min on two cores, 12 min.
pictures() {
    run data collect --env PandaReach-v0,PandaPush-v0 --episodes 3600 --out "$out/data" --seed 0
    run tokenizer train tokenizer --data "$out/data" --out "$out/first" --batch 16 --steps 30000 --max-minutes 12 \
        --resume
}

# 3 h 10 min.
nano() {
    data=$out/data first=$out/first final=$out/nano
    pictures
    run world train world --data "$data" --out "$first" --batch 8 --learning-rate 1.5e-3 --optimizer adamw --steps 20000 \
        --max-minutes 8 --resume
    run dida train dida --data "$data" --out "$first" --batch 8 --learning-rate 1.5e-3 --optimizer adamw --steps 20000 \
        --max-minutes 85 --subgoal-share 0 --resume
    run more train dida --data "$data" --init "$first" --out "$final" --path uniform,metric,state_coupled,mask \
        --subgoal-share 0.5 --batch 8 --learning-rate 1.5e-3 --optimizer adamw --steps 20000 --max-minutes 68 --resume
    measure "$final" PandaReach-v0 PandaPush-v0
}

# Reach, push and pick-place with an eye, in the codes of nano's tokenizer. 82 min, the data 8 min.
panda() {
    out=runs/models/nano
    pictures
    tokenizer=$out/first/tokenizer out=runs/models/panda
    data=$out/data first=$out/first final=$out/panda tasks=PandaReach-v0,PandaPush-v0,PandaPickPlace-v0
    run data collect --env "$tasks" --episodes 3000 --cameras front --out "$data" --seed 0
    run eye train eye --data "$data" --out "$first" --steps 20000 --max-minutes 6 --resume
    run world train world --data "$data" --out "$first" --tokenizer "$tokenizer" --batch 4 --steps 20000 \
        --max-minutes 5 --subgoal-share 0 --resume
    run dida train dida --data "$data" --out "$first" --path state_coupled --batch 4 --steps 20000 --max-minutes 32 \
        --subgoal-share 0 --resume
    run reward train reward --data "$data" --out "$first" --steps 20000 --max-minutes 4 --resume
    run policy train policy --data "$data" --init "$first" --out "$final" --env "$tasks" --optimizer muon \
        --learning-rate 2e-3 --batch 64 --world-windows 2 --steps 20000 --max-minutes 35 --resume
    measure "$final" PandaReach-v0 PandaPush-v0 PandaPickPlace-v0
}

# Push-T (needs the extra `suites`). 71 min, the data 20 min.
pusht() {
    data=$out/data first=$out/first final=$out/pusht mixture=expert=0.35,noisy=0.3,random=0.1,play=0.25
    run data collect --suite pusht --episodes 600 --mixture "$mixture" --out "$data" --seed 0
    run tokenizer train tokenizer --preset pusht --data "$data" --out "$first" --batch 16 --steps 30000 \
        --max-minutes 6 --resume
    run more collect --suite pusht --episodes 1000 --mixture "$mixture" --out "$data" --seed 0
    run eye train eye --preset pusht --data "$data" --out "$first" --steps 20000 --max-minutes 5 --resume
    run world train world --preset pusht --data "$data" --out "$first" --batch 4 --steps 20000 --max-minutes 4 \
        --subgoal-share 0 --resume
    run dida train dida --preset pusht --data "$data" --out "$first" --path state_coupled --batch 4 --steps 20000 \
        --max-minutes 34 --subgoal-share 0 --resume
    run numbers train dida --preset pusht --data "$data" --init "$first" --out "$final" --path state_coupled --batch 2 \
        --number-windows 32 --learning-rate 2e-3 --steps 20000 --max-minutes 22 --subgoal-share 0 --resume
    measure "$final" PushT
}

# Nine of Meta-World's tasks, 36,000 env steps of each (needs the extra `suites`). 81 min, the data 27 min.
metaworld() {
    data=$out/data first=$out/first final=$out/metaworld tasks=
    for task in reach reach-wall drawer-close button-press-topdown-wall coffee-push door-lock hammer handle-pull-side \
        plate-slide; do
        tasks=${tasks:+$tasks,}MetaWorld/$task-v3
    done
    run data collect --env "$tasks" --episodes 1620 --mixture expert=0.35,noisy=0.35,random=0.1,play=0.2 --workers 1 \
        --out "$data" --seed 0
    run tokenizer train tokenizer --preset metaworld --data "$data" --out "$first" --batch 16 --steps 30000 \
        --max-minutes 7 --resume
    run eye train eye --preset metaworld --data "$data" --out "$first" --steps 20000 --max-minutes 8 --resume
    run world train world --preset metaworld --data "$data" --out "$first" --batch 4 --steps 20000 --max-minutes 4 \
        --subgoal-share 0 --resume
    run dida train dida --preset metaworld --data "$data" --out "$first" --path state_coupled --batch 4 --steps 20000 \
        --max-minutes 24 --subgoal-share 0 --resume
    run reward train reward --preset metaworld --data "$data" --out "$first" --steps 20000 --max-minutes 4 --resume
    run policy train policy --preset metaworld --data "$data" --init "$first" --out "$final" --optimizer muon \
        --learning-rate 2e-3 --batch 32 --world-windows 2 --steps 20000 --max-minutes 34 --resume
    measure "$final" MetaWorld/reach-v3 MetaWorld/plate-slide-v3
}

# measure CHECKPOINT ENV...: what it knows in each environment, and its card.
measure() {
    checkpoint=$1
    shift
    found=
    for env in "$@"; do
        file=inspect-${env##*/}
        run "$file" inspect --checkpoint "$checkpoint" --env "$env" --json "$out/$file.json"
        found=${found:+$found,}$out/$file.json
    done
    run card card --checkpoint "$checkpoint" --inspect "$found"
}

for model in "$@"; do
    case $model in
        metaworld | nano | panda | pusht) ;;
        *)
            echo "no recipe for '$model': known are metaworld, nano, panda, pusht" >&2
            exit 2
            ;;
    esac
    out=runs/models/$model
    "$model"
done
