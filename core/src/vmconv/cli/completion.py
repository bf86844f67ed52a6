"""`vmconv completion`: completion of commands, options and their values for shells.

The printed script asks vmconv itself at each key: only the program knows which formats are installed.
"""

from __future__ import annotations

import argparse

from vmconv.cli.verbs import Verb

# bash and zsh and fish complete file names themselves if there are no candidates.
_BASH = """\
_vmconv() {
    local IFS=$'\\n'
    COMPREPLY=($(vmconv completion bash --answer "${COMP_LINE:0:COMP_POINT}" 2> /dev/null))
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o bashdefault -o default -F _vmconv vmconv
"""
_ZSH = """\
#compdef vmconv
_vmconv() {
    local -a found open
    found=("${(@f)$(vmconv completion zsh --answer "${(j: :)${(@q)words[1,CURRENT-1]}} $PREFIX" 2> /dev/null)}")
    if [[ -z "${found[1]}" ]]; then
        _files
        return
    fi
    open=(${(M)found:#*=})
    found=(${found:#*=})
    compadd -S '' -a open
    compadd -a found
}
if [[ "${funcstack[1]}" == _vmconv ]]; then
    _vmconv "$@"
else
    compdef _vmconv vmconv
fi
"""
_FISH = """\
function __vmconv_complete
    set -l found (vmconv completion fish --answer (commandline -cp | string collect) 2> /dev/null)
    if test -n "$found"
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c vmconv -f -a '(__vmconv_complete)'
"""
_SCRIPTS = {"bash": _BASH, "fish": _FISH, "zsh": _ZSH}


def _run(options: argparse.Namespace) -> int:
    if options.answer is None:
        print(_SCRIPTS[options.shell], end="")
        return 0
    from vmconv.cli.candidates import candidates, split

    words = split(options.answer)
    found = candidates(words)
    # bash replaces only what follows these characters.
    done = max(words[-1].rfind("="), words[-1].rfind(":")) + 1 if options.shell == "bash" and words else 0
    print("".join(f"{word[done:]}\n" for word in found), end="")
    return 0


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(_SCRIPTS), help="shell to complete for")
    parser.add_argument(
        "--answer",
        metavar="LINE",
        help="print what may stand at the end of this command line, as the script asks at each key",
    )


VERB = Verb(
    "Prints a script that makes a shell complete commands, options, formats, and names and values of -o.",
    _configure,
    _run,
    "examples:\n  vmconv completion bash > ~/.local/share/bash-completion/completions/vmconv\n"
    "  vmconv completion zsh > ~/.zfunc/_vmconv  # a directory of $fpath\n"
    "  vmconv completion fish > ~/.config/fish/completions/vmconv.fish",
)
