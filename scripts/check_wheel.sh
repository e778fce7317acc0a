#!/usr/bin/env bash
# Install a wheel into clean environments, with pip and with uv and without the constraints file, and use it there:
#
#     make wheel && scripts/check_wheel.sh dist/merv_pipeline-*.whl
#
# PYTHON is the interpreter to make environments with, UV the uv program (left out where there is none).
set -euo pipefail
wheel=$(realpath "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
uv=${UV:-$(command -v uv || true)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

seconds() { date +%s.%N; }
check() {  # name, folder of the environment, seconds of the installation
    local bin=$2/bin
    mkdir -p "$work/$1/hiding/pipeline" "$work/$1/hiding/jobs" "$work/$1/tests-of-wheel"
    # A user's folder with names of ours: commands work there, and the import names the file.
    for file in pipeline/__init__.py jobs/__init__.py trainer.py; do
        echo 'raise SystemExit("run by accident")' >"$work/$1/hiding/$file"
    done
    cd "$work/$1/hiding"
    "$bin/merv-pipeline" --version
    for program in merv-pipeline merv-train merv-eval; do "$bin/$program" --help >/dev/null; done
    "$bin/merv-pipeline" datasets >/dev/null
    "$bin/python" -c 'import mervcache; mervcache.ExtractConfig' 2>error && { echo "a hidden package was not found out"; exit 1; }
    grep -q "hides the package" error
    "$bin/python" - "$bin/merv-pipeline" <<'EOF'
import resource, subprocess, sys
times = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.argv[1], "--help"], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
print(f"merv-pipeline --help: {min(times):.2f} s of processor time, best of 5")
assert min(times) < 0.5
EOF
    # The tests without the checkout's packages next to them.
    cp -r "$root/tests" "$root/pyproject.toml" "$work/$1/tests-of-wheel/"
    cd "$work/$1/tests-of-wheel"
    files=$("$bin/python" -c '
from tests.conftest import QUICK
print(*(f"tests/{folder}/test_{name}.py" for folder, names in QUICK.items() for name in sorted(names)))')
    # shellcheck disable=SC2086
    "$bin/python" -m pytest -q -m quick $files
    echo "$1: installed in $3 s"
}

"$python" -m venv "$work/pip-env"
start=$(seconds)
"$work/pip-env/bin/python" -m pip install --quiet "$wheel"
took=$(echo "$(seconds) - $start" | bc)
"$work/pip-env/bin/python" -m pip install --quiet pytest hypothesis
check pip "$work/pip-env" "$took"

if [ -n "$uv" ]; then
    "$uv" venv --quiet --python "$python" "$work/uv-env"
    start=$(seconds)
    "$uv" pip install --quiet --python "$work/uv-env/bin/python" "$wheel"
    took=$(echo "$(seconds) - $start" | bc)
    "$uv" pip install --quiet --python "$work/uv-env/bin/python" pytest hypothesis
    check uv "$work/uv-env" "$took"
fi
