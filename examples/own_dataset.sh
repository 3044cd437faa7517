#!/usr/bin/env bash
# From a data yaml and a checkpoint to a signed bundle for a robot.
#
#   examples/own_dataset.sh my.yaml yolov8s.pt [TARGET [section.key=value ...]]
#
# TARGET is cpu (the default), gpu, jetson-orin or jetson-xavier. Knobs that follow it go into the recipe.
# A run that was stopped continues when the same command is given again.
set -euo pipefail

data=$1 weights=$2 target=${3:-cpu}
name=$(basename "${data%.*}")
recipe=$name-recipe.yaml

if [ ! -e "$recipe" ]; then
    yolo-compress init data.yaml="$data" weights="$weights" target="$target" out="$recipe" "${@:4}"
fi
yolo-compress run recipe="$recipe" # exit code 1 if the compressed model fails its gate
if [ ! -e robot.key ]; then
    yolo-compress keygen out=robot.key # stays on the workstation; robot.key.pub goes to the robots
fi
yolo-compress bundle recipe="$recipe" out="$name.tar" key=robot.key
