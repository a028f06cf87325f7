#!/usr/bin/env bash
# The runner on aarch64, emulated: its tests, and the same greedy tokens as on this machine.
#
#     benchmarks/aarch64.sh BUNDLE [--tokens 24] [--flavours "ort"] [--folder aarch64-root] [--cpu max] [--no-tests]
#
# Debian's arm64 Python and the aarch64 wheels go into --folder (400 MB, kept for the next run), and so does a copy
# of the checkout's tracked files, made anew by each run; nothing on this machine is changed and no root rights are
# needed. The bundle writes --tokens tokens after a prompt, here and under qemu-user, from the graphs --flavours
# ("ort native" for both; native needs `aarch64-linux-gnu-gcc`, and this machine's own operators to compare with);
# then tests/runtime run under qemu-user, but for two that measure seconds and memory and for what needs torch, the
# server or a browser. --cpu: any that `qemu-aarch64-static -cpu help` names, such as cortex-a72 (no integer dot
# products). Emulation costs a factor of 10 to 100, so the speeds say nothing about a phone.
# The last line of output is one JSON document. Exit code 1 if tokens differ or a test fails, 2 for a mistake.
# Needs a Debian (or Ubuntu) with apt-get, git and qemu-user-static, and in $PYTHON (default: python3) pip and what
# the package depends on.
set -euo pipefail

fail() { echo "$1" >&2; exit 2; }

checkout=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
bundle="" tokens=24 flavours=ort folder=aarch64-root cpu=max tests=yes
while [ $# -gt 0 ]; do
    case $1 in
    --tokens) tokens=$2; shift 2 ;;
    --flavours) flavours=$2; shift 2 ;;
    --folder) folder=$2; shift 2 ;;
    --cpu) cpu=$2; shift 2 ;;
    --no-tests) tests=no; shift ;;
    -*) fail "There is no option $1; see the top of $0." ;;
    *) bundle=$1; shift ;;
    esac
done
[ -f "$bundle/lawcat_bundle.json" ] || fail "Give the folder of a bundle; make one with \`lawcat-edge export\`."
qemu=$(command -v qemu-aarch64-static) || fail "qemu-aarch64-static is missing; run \`apt-get install qemu-user-static\`."
bundle=$(cd "$bundle" && pwd)
mkdir -p "$folder" && folder=$(cd "$folder" && pwd)
root=$folder/root site=$folder/site tree=$folder/tree

# An apt of its own, for arm64, that believes nothing is installed: it resolves and fetches, and installs nothing.
arm_apt() {
    apt-get -q -q -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o Dir::State="$folder/apt" \
        -o Dir::State::status="$folder/apt/status" -o Dir::Cache="$folder/apt" -o APT::Sandbox::User="" "$@"
}
if [ ! -f "$folder/root.done" ]; then
    rm -rf "$root" && mkdir -p "$root" "$folder/apt/lists/partial" "$folder/apt/archives/partial"
    : >"$folder/apt/status"
    arm_apt update
    arm_apt install --yes --download-only --no-install-recommends python3 libpython3-stdlib libstdc++6
    for package in "$folder"/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
    touch "$folder/root.done"
fi
version=$(basename "$(readlink -f "$root/usr/bin/python3")") && version=${version#python}

# The runner's dependencies as the package states them, and what its tests import besides.
wanted=$("$python" - "$checkout/pyproject.toml" <<'EOF'
import re, sys, tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]["build"] + project["optional-dependencies"]["test"]
besides = ("onnx", "pytest", "pytest-timeout", "hypothesis")
print(*project["dependencies"], *(line for line in extras if re.match(r"[\w-]+", line)[0] in besides), sep="\n")
EOF
)
if [ "$(cat "$site.done" 2>/dev/null)" != "$wanted" ]; then
    platforms=()
    for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
        platforms+=(--platform "${platform}_aarch64")
    done
    rm -rf "$site" "$site.done"
    mapfile -t packages <<<"$wanted"
    "$python" -m pip install --quiet --target "$site" --only-binary :all: "${platforms[@]}" \
        --implementation cp --python-version "$version" "${packages[@]}"
    echo "$wanted" >"$site.done"
fi

# A copy without what is not tracked: the checkout may hold operators compiled for this machine.
rm -rf "$tree" && mkdir "$tree"
(cd "$checkout" && git ls-files -z | tar --create --null --files-from=-) | tar --extract --directory="$tree"

lacking="" # why native is left out
if compiler=$(command -v aarch64-linux-gnu-gcc); then
    flags=$("$python" - "$checkout/pyproject.toml" <<'EOF'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    (module,) = tomllib.load(file)["tool"]["setuptools"]["ext-modules"]
print(*module["extra-compile-args"])
EOF
    )
    # shellcheck disable=SC2086 # one word a flag
    "$compiler" $flags -fPIC -shared -o "$tree/runtime/native/_operators.abi3.so" "$tree/runtime/native/operators.c"
else
    lacking="aarch64-linux-gnu-gcc is missing; run \`apt-get install gcc-aarch64-linux-gnu\`"
fi

# onnxruntime asks /proc/cpuinfo what this is, and ends with a segmentation fault at x86's answer; qemu looks for
# every file under the root first.
mkdir -p "$root/proc"
for i in $(seq 0 $(($(nproc) - 1))); do
    printf '%s\t: %s\n' processor "$i" Features "fp asimd aes pmull sha1 sha2 crc32 atomics asimdrdm asimddp" \
        "CPU implementer" 0x41 "CPU architecture" 8 "CPU variant" 0x3 "CPU part" 0xd0b "CPU revision" 1
    echo
done >"$root/proc/cpuinfo"

# A script in the place of the interpreter, so that a test's sys.executable runs under qemu too.
mkdir -p "$folder/bin"
cat >"$folder/bin/python" <<EOF
#!/bin/sh
export PYTHONHOME="$root/usr" PYTHONPATH="$tree:$site" PYTHONDONTWRITEBYTECODE=1
exec "$qemu" -cpu "$cpu" -L "$root" -0 "$folder/bin/python" "$root/usr/bin/python$version" "\$@"
EOF
chmod +x "$folder/bin/python"
"$folder/bin/python" -c 'import platform, onnxruntime; print(platform.machine(), platform.python_version(), onnxruntime.__version__)'

write() { # INTERPRETER FLAVOUR -> a JSON line with the tokens
    "$1" - "$bundle" "$2" "$tokens" <<'EOF'
import json, platform, sys, time
from lawcat_edge.runtime import Model

path, flavour, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = Model.load(path, threads=1, flavour=flavour, check_hashes=False)
begin = time.perf_counter()
result = model.generate("The lighthouse stands on", max_new_tokens=count, ignore_eos=True).result()
seconds = time.perf_counter() - begin
print(json.dumps({"machine": platform.machine(), "tokens": result.tokens, "text": result.text, "seconds": seconds}))
EOF
}

offers() { # INTERPRETER -> whether it has operators of its own
    "$1" -c 'from lawcat_edge.runtime.native import library; raise SystemExit(library() is None)'
}
case " $flavours " in *" native "*)
    if [ -z "$lacking" ] && ! PYTHONPATH=$checkout offers "$python"; then
        lacking="this machine has no operators of its own to compare with"
    fi
    if [ -n "$lacking" ]; then
        echo "The flavour native is left out: $lacking." >&2
        flavours=" $flavours " && flavours=${flavours/ native / }
        [ -n "${flavours// /}" ] || fail "No flavour is left to compare."
    fi
    ;;
esac

status=0 rows=""
for flavour in $flavours; do
    here=$(PYTHONPATH=$checkout write "$python" "$flavour")
    there=$(cd "$tree" && write "$folder/bin/python" "$flavour") # Python looks in the current folder first
    row=$("$python" - "$flavour" "$here" "$there" <<'EOF'
import json, sys

flavour, here, there = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
print(json.dumps({"flavour": flavour, "same": here["tokens"] == there["tokens"], "here": here, "there": there}))
EOF
    )
    echo "$row"
    case $row in *'"same": true'*) ;; *) status=1 ;; esac
    rows="$rows${rows:+, }$row"
done

passed=null
if [ "$tests" = yes ]; then
    # Left out: the two tests that measure seconds and memory, which here are the emulator's. The profile "ci" of
    # hypothesis sets no deadline for an example and lets data be slow to make. Two files cannot be imported without
    # torch and the server; others skip themselves.
    if (cd "$tree" && "$folder/bin/python" -m pytest --hypothesis-profile=ci -o timeout=1800 tests/runtime \
        --ignore tests/runtime/test_hub.py --ignore tests/runtime/test_web.py \
        --deselect tests/runtime/test_generate.py::test_importing_the_runner_is_cheap \
        --deselect tests/runtime/test_generate.py::test_a_long_prompt_costs_no_more_memory_than_a_short_one); then
        passed=true
    else
        passed=false status=1
    fi
fi
echo "{\"cpu\": \"$cpu\", \"rows\": [$rows], \"tests_passed\": $passed}"
exit $status
