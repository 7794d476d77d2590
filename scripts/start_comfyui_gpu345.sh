#!/usr/bin/env bash
# Starts ComfyUI on port 12215 with TACO-DiT on GPUs 3, 4 and 5: COMFYUI_PATH=… scripts/start_comfyui_gpu345.sh [ComfyUI options]
#
#   COMFYUI_PATH    the ComfyUI checkout (default: the current folder, if it is one)
#   COMFYUI_PYTHON  its interpreter (default: its own venv or .venv, else python3)
#   TACO_GPUS       the GPUs, as nvidia-smi numbers them, of a daemon that is started here (default 3,4,5)
#   TACO_NETWORKS   1 lets the daemon run this ComfyUI's own networks where it has none itself (default: it doesn't)
#   PORT            ComfyUI's (default 12215)
#   TACOD_ENDPOINT  a daemon that runs already; none is started then
#
# The daemon is the one that TACOD_ENDPOINT names, else the service tacod if it is installed, else one of this script's own.
# ComfyUI gets the GPUs that the daemon doesn't have, or the CPU if none is left.
set -euo pipefail
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
gpus=${TACO_GPUS:-3,4,5}

fail() {
  echo "start_comfyui_gpu345: $*" >&2
  exit 1
}

[ -n "${COMFYUI_PATH:-}" ] || { [ -f main.py ] && [ -d custom_nodes ] && COMFYUI_PATH=$PWD; } ||
  fail "set COMFYUI_PATH to your ComfyUI folder, the one with main.py"
[ -f "$COMFYUI_PATH/main.py" ] || fail "there is no main.py in COMFYUI_PATH=$COMFYUI_PATH"
COMFYUI_PATH=$(cd "$COMFYUI_PATH" && pwd)
python=${COMFYUI_PYTHON:-}
for candidate in "$COMFYUI_PATH/venv/bin/python" "$COMFYUI_PATH/.venv/bin/python"; do
  [ -n "$python" ] || { [ -x "$candidate" ] && python=$candidate; }
done
python=${python:-python3}
"$python" -c "import tacod_client" 2>/dev/null ||
  fail "ComfyUI's Python ($python) has no TACO-DiT client; run: $python -m pip install $here"

nodes=$COMFYUI_PATH/custom_nodes/taco_dit
if [ ! -e "$nodes" ]; then
  ln -s "$here/comfy_nodes" "$nodes"
  echo "linked $nodes"
fi

daemon=
# shellcheck disable=SC2317  # the trap calls it
stop_daemon() {
  # Only a daemon that this script has started.
  if [ -n "$daemon" ] && kill "$daemon" 2>/dev/null; then
    wait "$daemon" || true
  fi
}
trap stop_daemon EXIT

gpus_of_daemon() {
  "$python" -c '
import sys, time
from tacod_client import Client, TacodError
try:
    with Client() as client:
        for _ in range(30):  # between two generations of ranks there are none
            ranks = client.status()["group"]["ranks"]
            if ranks:
                print(",".join(rank["device"] for rank in ranks))
                sys.exit()
            time.sleep(0.5)
    sys.exit("the daemon has no ranks; its log says why")
except TacodError as error:
    sys.exit(error.message)' || fail "ComfyUI can't be kept off the daemon's GPUs without asking it which they are"
}

if [ -n "${TACOD_ENDPOINT:-}" ]; then
  gpus=$(gpus_of_daemon)
  echo "using the daemon at $TACOD_ENDPOINT, on $gpus"
elif systemctl cat tacod.service >/dev/null 2>&1; then
  systemctl is-active --quiet tacod || systemctl start tacod || fail "try: sudo systemctl start tacod"
  gpus=$(gpus_of_daemon)
  echo "using the service tacod, on $gpus"
else
  tacod=$(command -v tacod || true)
  [ -n "$tacod" ] || tacod=$here/.venv/bin/tacod
  [ -x "$tacod" ] || fail "no tacod is installed; run: pip install '${here}[daemon]'"
  folder=${XDG_RUNTIME_DIR:-$HOME/.cache}/tacod
  uploads=${XDG_CACHE_HOME:-$HOME/.cache}/tacod/uploads
  mkdir -p "$folder" "$uploads"
  chmod 700 "$folder"
  export TACOD_ENDPOINT="ipc://$folder/tacod.sock"
  cat > "$folder/config.toml" <<CONFIG
endpoint = "$TACOD_ENDPOINT"
[group]
device = "cuda"
gpus = [$gpus]
[models]
roots = ["$COMFYUI_PATH/models"]
uploads = "$uploads"
CONFIG
  if [ "${TACO_NETWORKS:-0}" = 1 ]; then
    printf '[comfyui]\npath = "%s"\n' "$COMFYUI_PATH" >> "$folder/config.toml"
  fi
  "$tacod" --config "$folder/config.toml" --check-config
  "$tacod" --config "$folder/config.toml" &
  daemon=$!
  echo "started tacod (pid $daemon) on GPUs $gpus"
fi

# ComfyUI gets the GPUs that the daemon doesn't have; it may know them by index or by UUID.
others=$(nvidia-smi --query-gpu=index,uuid --format=csv,noheader 2>/dev/null |
  while IFS=', ' read -r index uuid; do
    case ",${gpus// /}," in *",$index,"* | *",$uuid,"*) ;; *) echo "$index" ;; esac
  done | paste -sd, -) || true
options=(--listen 0.0.0.0 --port "${PORT:-12215}")
if [ -n "$others" ]; then
  export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=$others
  echo "ComfyUI runs on GPU $others"
else
  options+=(--cpu)
  echo "ComfyUI runs on the CPU: no GPU is left beside $gpus"
fi

cd "$COMFYUI_PATH"
set -m # ComfyUI in a process group of its own: a job without one is deaf to Ctrl-C
"$python" main.py "${options[@]}" "$@" &
comfyui=$!
set +m
trap 'kill -INT "$comfyui"' INT
trap 'kill -TERM "$comfyui"' TERM HUP
while kill -0 "$comfyui" 2>/dev/null; do
  wait "$comfyui" || true # a signal ends the wait, but not yet ComfyUI
done
code=0
wait "$comfyui" || code=$?
exit "$code"
