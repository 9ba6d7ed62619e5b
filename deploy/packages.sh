# shellcheck shell=bash disable=SC2034
# What the project installs, by Debian 12 name; sourced by deploy/build and tests/run.
# SPDX-License-Identifier: Apache-2.0
TD_BUILD_PACKAGES=(gcc libc6-dev cmake ninja-build ccache pkg-config libzmq3-dev libprotobuf-c-dev protobuf-c-compiler libevent-dev
  libssl-dev libnghttp2-dev libpcre2-dev libutf8proc-dev libsodium-dev libcurl4-openssl-dev
  libopenmpi-dev openmpi-bin)
TD_TEST_PACKAGES=(g++ binutils python3 python3-venv git curl shellcheck iproute2 procps)
TD_TEST_PYTHON=(numpy safetensors grpcio grpcio-health-checking grpcio-tools openai jinja2 tokenizers)

need_packages() {
  local missing=() p
  for p in "$@"; do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  local sudo=
  [ "$(id -u)" -eq 0 ] || sudo=sudo
  echo "installing: ${missing[*]}"
  $sudo apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# A virtual environment under build/ with the given packages; made once per list.
need_python() {
  local want="$*"
  if [ "$(cat build/venv/.packages 2>/dev/null)" != "$want" ]; then
    mkdir -p build
    [ -x build/venv/bin/python ] || python3 -m venv build/venv
    build/venv/bin/python -m pip -q install --disable-pip-version-check "$@"
    echo "$want" > build/venv/.packages
  fi
}
