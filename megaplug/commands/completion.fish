# Completion of megaplug's commands for fish:   python launch/train.py --completion fish | source

# Proposals for the word at the cursor; the argument says how many words start the program.
function __megaplug_propose
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -l found ($words[1..$argv[1]] --complete "$word" $words[(math $argv[1] + 1)..-1] 2>/dev/null)
    if test "$found[1]" = :files
        __fish_complete_path "$word"
    else
        printf '%s\n' $found
    end
end

function __megaplug_is_script
    set -l words (commandline -opc)
    test (count $words) -ge 2; and grep -qs '^from megaplug\.entry ' -- $words[2]
end

for program in megaplug-train megaplug-plan megaplug-prepare megaplug-checkpoint megaplug-runs
    complete -c $program -f -a '(__megaplug_propose 1)'
end
for program in python python3
    complete -c $program -n __megaplug_is_script -f -a '(__megaplug_propose 2)'
end
