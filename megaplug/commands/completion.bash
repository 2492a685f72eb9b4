# Completion of megaplug's commands for bash:   eval "$(python launch/train.py --completion bash)"

# Proposals for the word at the cursor; the arguments are the words that start the program.
_megaplug_propose() {
    local line=${COMP_LINE:0:COMP_POINT} word="" taken=$# i
    local -a before
    # Cut at spaces only: COMP_WORDS is cut at = as well.
    read -ra before <<<"$line"
    if [[ $line != *[[:space:]] ]]; then
        word=${before[${#before[@]} - 1]}
        unset "before[${#before[@]} - 1]"
    fi
    # Variables that are set for the command stand before it.
    while [[ ${#before[@]} -gt 0 && ${before[0]} != "$1" ]]; do before=("${before[@]:1}"); done
    mapfile -t COMPREPLY < <("$@" --complete "$word" "${before[@]:taken}" 2>/dev/null)
    if [[ ${COMPREPLY[0]-} == :files ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "${word##*=}")
        return
    fi
    for i in "${!COMPREPLY[@]}"; do
        COMPREPLY[i]=${COMPREPLY[i]%%$'\t'*}
        # What stands before the last = is left as it is, unless = does not divide words here.
        [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && COMPREPLY[i]=${COMPREPLY[i]#"${word%%=*}="}
    done
    if [[ ${COMPREPLY[0]-} == *[=.] ]]; then compopt -o nospace 2>/dev/null; fi
}

_megaplug() {
    _megaplug_propose "${COMP_WORDS[0]}"
}

# python launch/train.py; any other python is completed as before.
_megaplug_python() {
    local script=${COMP_WORDS[1]-}
    if [[ $COMP_CWORD -gt 1 && $script == *.py && -r $script ]] && grep -qs '^from megaplug\.entry ' "$script"; then
        compopt +o bashdefault +o default 2>/dev/null
        _megaplug_propose "${COMP_WORDS[0]}" "$script"
    elif [[ ${_megaplug_former-} =~ \ -F\ ([^ ]+) ]]; then
        "${BASH_REMATCH[1]}" "$@"
    fi
}

if [[ $(complete -p python 2>/dev/null) != *_megaplug_python* ]]; then
    _megaplug_former=$(complete -p python 2>/dev/null || true)
fi
complete -F _megaplug megaplug-train megaplug-plan megaplug-prepare megaplug-checkpoint megaplug-runs
complete -o bashdefault -o default -F _megaplug_python python python3
