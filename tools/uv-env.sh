# To be sourced by sh. uv does not read pip's configuration: hand on the package indexes that the user has set there.
# PIP_PYTHON is the Python whose pip is asked. Variables of uv that the user has set win.
pip_setting() {
    "${PIP_PYTHON:-python3}" -m pip config get "global.$1" 2>/dev/null | tr '\n' ' ' | sed 's/ *$//'
}
if [ -z "${UV_DEFAULT_INDEX:-}" ]; then
    UV_DEFAULT_INDEX=${PIP_INDEX_URL:-$(pip_setting index-url)}
    if [ -n "$UV_DEFAULT_INDEX" ]; then export UV_DEFAULT_INDEX; else unset UV_DEFAULT_INDEX; fi
fi
if [ -z "${UV_INDEX:-}" ]; then
    UV_INDEX=${PIP_EXTRA_INDEX_URL:-$(pip_setting extra-index-url)}
    if [ -n "$UV_INDEX" ]; then
        # Otherwise uv takes a name only from the first index that has it; pip takes the best version of all.
        export UV_INDEX UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
    else
        unset UV_INDEX
    fi
fi
