#!/usr/bin/env bash
# Sets up zeroopt, torch and Python for 64-bit Arm in a folder, with a command there that runs that Python under an emulator. For Debian
# bookworm on x86-64, with the packages g++-aarch64-linux-gnu, qemu-user, cmake and ninja-build, and a network. Takes 0.8 GB.
#
#     PYTHON=.venv/bin/python tests/support/on_arm/emulated_python.sh /tmp/on_arm
#     cd /tmp/on_arm/zeroopt && QEMU_CPU=max,sve256=on ../python -m pytest tests/csrc/cpu/test_isa.py
#
# PYTHON: one of version 3.11 with pip, whose headers are taken for the compiled module. QEMU_CPU: `qemu-aarch64 -cpu help`.
set -euo pipefail
python=$(realpath --no-symlinks "${PYTHON:-python3.11}")
repository=$(realpath "$(dirname "$0")/../../..")
mkdir -p "$1"
cd "$1"

# Python, and what it loads, from Debian: in a folder, beside the packages of this machine.
mkdir -p apt/lists/partial apt/archives/partial debs root site
touch apt/status
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$PWD/apt" -o Dir::State::status="$PWD/apt/status"
  -o Dir::Cache="$PWD/apt" -o APT::Sandbox::User=root)
"${apt[@]}" update
(cd debs && "${apt[@]}" download libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libexpat1 \
  libuuid1 libcrypt1 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib python3.11)
for package in debs/*.deb; do dpkg -x "$package" root; done

# Of torch 2.8.0 the wheel for Arm on PyPI has no CUDA. What a package asks for is listed here: pip would ask for what this machine needs.
"$python" -m pip install --quiet --target site --upgrade --no-deps --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 \
  --abi abi3 --platform manylinux2014_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_28_aarch64 torch==2.8.0 numpy \
  filelock fsspec jinja2 markupsafe mpmath networkx sympy typing-extensions pytest pytest-timeout iniconfig packaging pluggy pygments \
  hypothesis sortedcontainers
"$python" -m pip install --quiet --target tools --upgrade pybind11

cat >python <<END
#!/usr/bin/env bash
export PYTHONHOME=$PWD/root/usr QEMU_LD_PREFIX=$PWD/root QEMU_CPU=\${QEMU_CPU:-max} PYTHONPATH=$PWD/site\${PYTHONPATH:+:\$PYTHONPATH}
exec qemu-aarch64 $PWD/root/usr/bin/python3.11 "\$@"
END
chmod +x python
# Processes that a test starts go through the emulator, too.
echo "import sys; sys.executable = '$PWD/python'" >site/sitecustomize.py

cmake -S "$repository" -B build -G Ninja -DZEROOPT_CUDA=off -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$PWD/tools/pybind11/share/cmake/pybind11" \
  -DPython_INCLUDE_DIR="$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
cmake --build build
mkdir -p zeroopt
cp -r "$repository"/{zeroopt,tests,pyproject.toml,csrc,cmake} zeroopt/
rm -f zeroopt/zeroopt/_C*.so
cp build/_C*.so zeroopt/zeroopt/_C.cpython-311-aarch64-linux-gnu.so
