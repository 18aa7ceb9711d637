#!/usr/bin/env bash
# Print the first working interpreter of the given versions (default: 3.11 and newer), or else a python3 that is new
# enough. Searches PATH and pyenv's versions.
set -u
series=("${@:-3.11}")
[ "$#" -le 1 ] && series=("${1:-3.11}" 3.12 3.13 3.14)
for version in "${series[@]}"; do
  for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
    if found="$("$candidate" -c "import sys; assert sys.version_info[:2] == tuple(map(int, '$version'.split('.'))); print(sys.executable)" 2>/dev/null)"; then
      echo "$found"
      exit 0
    fi
  done
done
if [ "$#" -le 1 ]; then
  python3 -c "import sys; assert sys.version_info >= (3, 11); print(sys.executable)" 2>/dev/null
fi
exit 0
