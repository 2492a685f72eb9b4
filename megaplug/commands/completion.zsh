# Completion of megaplug's commands for zsh:   source <(python launch/train.py --completion zsh)

# Proposals for the word at the cursor; the arguments are the words that start the program.
_megaplug_propose() {
    local line tab=$'\t'
    local -a whole begun whole_shown begun_shown
    for line in "${(@f)$("$@" --complete "$PREFIX" "${(@Q)words[$# + 1,CURRENT - 1]}" 2>/dev/null)}"; do
        case $line in
            "") ;;
            :files) compset -P '*='; _files ;;
            *[=.]|*[=.]$tab*) begun+=("${line%%$tab*}"); begun_shown+=("${line//$tab/  }") ;;
            *) whole+=("${line%%$tab*}"); whole_shown+=("${line//$tab/  }") ;;
        esac
    done
    (( $#whole )) && compadd -Q -l -d whole_shown -a whole
    (( $#begun )) && compadd -Q -l -S '' -d begun_shown -a begun
}

_megaplug() {
    _megaplug_propose "$words[1]"
}

# python launch/train.py; any other python is completed as before.
_megaplug_python() {
    local script=$words[2]
    if (( CURRENT > 2 )) && [[ $script == *.py && -r $script ]] && grep -qs '^from megaplug\.entry ' "$script"; then
        _megaplug_propose "$words[1]" "$script"
    elif (( $+functions[_python] )); then
        _python "$@"
    else
        _files
    fi
}

(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
compdef _megaplug megaplug-train megaplug-plan megaplug-prepare megaplug-checkpoint megaplug-runs
compdef _megaplug_python python python3
