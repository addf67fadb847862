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

# 3 h 10 min on one core of a 2.5 GHz Xeon without matrix units, shared with other work (the data: 8 min on two).
nano() {
    data=$out/data first=$out/first final=$out/nano
    run data collect --env PandaReach-v0,PandaPush-v0 --episodes 3600 --out "$data" --seed 0
    run tokenizer train tokenizer --data "$data" --out "$first" --batch 16 --steps 30000 --max-minutes 12 --resume
    run world train world --data "$data" --out "$first" --batch 8 --learning-rate 1.5e-3 --optimizer adamw --steps 20000 \
        --max-minutes 8 --resume
    run dida train dida --data "$data" --out "$first" --batch 8 --learning-rate 1.5e-3 --optimizer adamw --steps 20000 \
        --max-minutes 85 --subgoal-share 0 --resume
    run more train dida --data "$data" --init "$first" --out "$final" --path uniform,metric,state_coupled,mask \
        --subgoal-share 0.5 --batch 8 --learning-rate 1.5e-3 --optimizer adamw --steps 20000 --max-minutes 68 --resume
    measure "$final" PandaReach-v0 PandaPush-v0
}

# measure CHECKPOINT ENV...: what it knows in each environment, and its card.
measure() {
    checkpoint=$1
    shift
    found=
    for env in "$@"; do
        run "inspect-$env" inspect --checkpoint "$checkpoint" --env "$env" --json "$out/inspect-$env.json"
        found=${found:+$found,}$out/inspect-$env.json
    done
    run card card --checkpoint "$checkpoint" --inspect "$found"
}

for model in "$@"; do
    case $model in
        nano) ;;
        *)
            echo "no recipe for '$model': known are nano" >&2
            exit 2
            ;;
    esac
    out=runs/models/$model
    "$model"
done
