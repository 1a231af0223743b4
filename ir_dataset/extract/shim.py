"""Stands on PATH as gcc, cc, clang, …: runs the real compiler, then has clang write bitcode too.

The build sees the real compiler's output and status, whatever happens here. Each C or C++ source of a
compile line that succeeded is compiled once more, to unoptimised bitcode, with the same front-end
flags; files land in the drop directory under names that say what they were made from.

A script of its own: standard library only, nothing imported that a call does not need, since builds
run it thousands of times. Called as `shim.py NAME ARGUMENTS`, it leaves out the compiler NAME and
writes the bitcode alone. Settings are in `settings.json` beside it (see `hook.py`):
    drop      directory for bitcode, descriptions and failures
    root      the package's tree; sources outside are not the package's
    c, cxx    commands that write bitcode
    zig       whether the commands are Zig's
    aliases   [prefix, shown] pairs: how directories outside are called in descriptions
    unit_s    seconds that one unit may take
    embed     true: the build itself is clang's, with bitcode embedded in its objects
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]

_C = (".c", ".i")
_CXX = (".cc", ".cp", ".cpp", ".cxx", ".c++", ".C", ".CPP", ".ii")

_NO_COMPILE = {"-E", "-M", "-MM", "-###", "-fsyntax-only", "--version", "--help"}

_WITH_VALUE = {
    *("-D", "-U", "-I", "-include", "-imacros", "-isystem", "-idirafter", "-iquote", "-iprefix"),
    *("-iwithprefix", "-iwithprefixbefore", "-isysroot", "--sysroot", "--param", "-target", "-A"),
    *("-Xpreprocessor", "-Xclang", "-arch"),
}
"""Kept with the argument that follows."""

_WITH_VALUE_DROPPED = {
    *("-o", "-MF", "-MT", "-MQ", "-Xlinker", "-Xassembler", "-L", "-l", "-T", "-u", "-z", "-e"),
    *("-B", "-b", "-V", "-wrapper", "-aux-info", "-dumpbase", "-dumpdir", "-h", "-R"),
}

_DROPPED = {
    *("-c", "-S", "-MD", "-MMD", "-MP", "-MG", "-shared", "-static", "-rdynamic", "-pie", "-s"),
    *("-no-pie", "-nostdlib", "-nostartfiles", "-nodefaultlibs", "-pipe", "-pass-exit-codes"),
    *("--coverage", "-pg", "-p", "-r", "-Q", "-symbolic", "-static-libgcc", "-static-libstdc++"),
    *("-static-pie", "-pedantic-errors", "-pedantic", "-w", "-v"),
}

_DROPPED_PREFIXES = (
    *("-Wl,", "-Wa,", "-l", "-L", "-save-temps", "-flto", "-fno-lto", "-ffat-lto", "-fno-fat-lto"),
    *("-fdump-", "-fplugin", "-fprofile", "-ftest-coverage", "-fuse-ld", "-fuse-linker", "-specs"),
    *("-fdiagnostics", "-fmessage-length", "-fanalyzer", "-g", "-fcompare-debug", "-time", "-B"),
    *("-Wp,-MD", "-Wp,-MMD", "-MF", "-MT", "-MQ", "-fsanitize", "-fmax-errors", "-frecord-gcc"),
    *("-fopt-info", "-o", "-T", "-fdebug-prefix-map"),
)
"""Linking, dependencies, debug information and instrumentation: not of the front end's IR."""

_PROBES = ("conftest", "ztest", "_configtest", "CMakeC", "CheckFunctionExists", "CheckSymbolExists")
_PROBE_DIRS = (
    *("/CMakeTmp", "/CMakeScratch", "/CompilerIdC", "/meson-private", "/.conf_check", "/.confdir"),
    *("/config.tests", "/_CMakeLTOTest", "/CheckI", "/ShowIncludes"),
)

_TOLERATED = (
    *("implicit-function-declaration", "implicit-int", "int-conversion", "return-mismatch"),
    *("incompatible-pointer-types", "incompatible-function-pointer-types", "return-type"),
    *("c++11-narrowing", "register", "reserved-user-defined-literal", "format-security"),
)
"""What gcc lets pass and clang by default does not."""


def main() -> int:
    """Run the compiler that was meant; returns its status."""
    arguments = sys.argv[1:]
    here = os.path.dirname(os.path.abspath(sys.argv[0]))
    name = os.path.basename(sys.argv[0])
    if name == "shim.py":
        _extract(_settings(here), arguments[0], arguments[1:])
        return 0
    real = _find(name, here)
    compiles = _may_compile(arguments)
    settings = _settings(here) if real is None or compiles else {}
    if real is None and not settings.get("instead"):
        sys.stderr.write(f"{name}: command not found\n")
        return 127
    compiler = [real] if real else settings["cxx" if name.endswith("++") else "c"]
    if not compiles:
        os.execv(compiler[0], [*compiler, *arguments])
    embed = settings.get("embed", False)
    status = _run(_embedding(settings, name, arguments) if embed else [*compiler, *arguments])
    if status == 0 and settings and (not embed or "-c" in arguments):
        try:
            _extract(settings, name, arguments)
        except Exception as error:
            _complain(settings, error)
    return status


def _find(name: str, here: str) -> str | None:
    for directory in os.environ.get("PATH", os.defpath).split(os.pathsep):
        candidate = os.path.join(directory or ".", name)
        if os.path.abspath(directory) != here and os.access(candidate, os.X_OK):
            return candidate
    return None


def _may_compile(arguments: list[str]) -> bool:
    """Whether a source may be among the arguments, and compiling be asked for."""
    if not _NO_COMPILE.isdisjoint(arguments):
        return False
    return any(
        part.endswith(_C + _CXX) or part[:1] == "@" or part[:2] == "-x" for part in arguments
    )


def _settings(here: str) -> dict:
    import json

    try:
        with open(os.path.join(here, "settings.json"), encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return {}


def _run(command: list[str]) -> int:
    """Status of the real compiler; where a signal ended it, the same one ends this process."""
    import signal

    child = os.posix_spawn(command[0], command, os.environ)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _complain(settings: dict, error: Exception) -> None:
    """A fault of the shim is a line in the drop directory, never the build's."""
    try:
        with open(os.path.join(settings["drop"], "shim-errors.log"), "a", encoding="utf-8") as log:
            log.write(f"{type(error).__name__}: {error} {sys.argv[1:]!r}\n")
    except OSError:
        pass


# --- the command line -------------------------------------------------------------------------


def _expand(arguments: list[str]) -> list[str]:
    """Response files in place of `@file`."""
    import shlex

    found: list[str] = []
    for argument in arguments:
        if argument[:1] == "@" and os.path.isfile(argument[1:]):
            with open(argument[1:], encoding="utf-8", errors="surrogateescape") as stream:
                found += shlex.split(stream.read())
        else:
            found.append(argument)
    return found


def _parse(arguments: list[str]) -> tuple[list[tuple[str, ...]], list[tuple[str, str]], str]:
    """Front-end flags (with their values), sources with the language set by `-x`, and the -O flag."""
    flags: list[tuple[str, ...]] = []
    sources: list[tuple[str, str]] = []
    level = language = ""
    rest = iter(arguments)
    for argument in rest:
        if argument == "-x" or (argument[:2] == "-x" and argument[2:3].islower()):
            language = argument[2:] or next(rest, "")
            language = "" if language == "none" else language
        elif argument in _WITH_VALUE_DROPPED:
            next(rest, "")
        elif argument in _WITH_VALUE:
            flags.append((argument, next(rest, "")))
        elif argument[:2] == "-O":
            level = argument
        elif argument[:1] != "-" or argument == "-":
            sources.append((argument, language))
        elif not _is_dropped(argument):
            flags.append((argument,))
    return flags, sources, level


def _is_dropped(argument: str) -> bool:
    if argument[:2] == "-W" and argument[:4] != "-Wp,":
        return True
    return argument in _DROPPED or argument.startswith(_DROPPED_PREFIXES)


def _language(path: str, forced: str, name: str) -> str:
    """`c`, `c++`, or empty where the compiler does not see C or C++ in it."""
    if forced:
        known = {"c": "c", "cpp-output": "c", "c++": "c++", "c++-cpp-output": "c++"}
        return known.get(forced, "")
    if path.endswith(_CXX):
        return "c++"
    return ("c++" if "++" in name else "c") if path.endswith(_C) else ""


def _is_probe(path: str) -> bool:
    """Whether a configure script made this source to see whether it compiles."""
    return os.path.basename(path).startswith(_PROBES) or any(part in path for part in _PROBE_DIRS)


# --- bitcode ----------------------------------------------------------------------------------


def _extract(settings: dict, name: str, arguments: list[str]) -> None:
    flags, sources, level = _parse(_expand(arguments))
    root, here = settings["root"], os.getcwd()
    requested = level
    forced = level in ("", "-O0") and not settings["embed"]
    flags.append(("-O2" if forced else level or "-O0",))
    for source, given in sources:
        language = _language(source, given, name)
        path = os.path.normpath(os.path.join(here, source))
        ours = path.startswith(root + "/") and os.path.isfile(path)
        if not language or not ours or _is_probe(path):
            continue
        unit = {
            "language": language,
            "source_path": os.path.relpath(path, root),
            "directory": os.path.relpath(here, root),
            "opt_level_requested": requested,
            "forced_o2": forced,
        }
        _one(settings, unit, [*flags, ("-x", given)] if given else flags, path)


def _one(settings: dict, unit: dict, flags: list[tuple[str, ...]], path: str) -> None:
    """Bitcode of one source, unless the same was made before."""
    import hashlib
    import json

    with open(path, "rb") as stream:
        unit["source_sha256"] = hashlib.sha256(stream.read()).hexdigest()
    shown = [_shown(part, settings) for flag in flags for part in flag]
    identity = json.dumps([unit, shown], sort_keys=True)
    key = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    target = os.path.join(settings["drop"], key)
    if os.path.exists(target + ".json") or os.path.exists(target + ".failed.json"):
        return
    temporary = f"{target}.{os.getpid()}"
    try:
        dropped, kind, reason = set(), "", ""
        if settings["embed"]:
            _keep_object(settings, unit, flags, path, temporary)
        else:
            dropped, kind, reason = _compile(settings, unit, flags, path, temporary)
        if kind:
            failure = {"kind": kind, "reason": reason, "source_path": unit["source_path"]}
            _write(target + ".failed.json", failure)
            return
        kept = [flag for flag in flags if flag[0] not in dropped]
        unit["arguments"] = [_shown(part, settings) for flag in kept for part in flag]
        unit["dropped_flags"] = sorted(dropped)
        unit["includes"] = _includes(temporary + ".d", path, settings)
        os.replace(temporary + ".bc", target + (".o" if settings["embed"] else ".bc"))
        _write(target + ".json", unit)
    finally:
        for ending in (".bc", ".d", ".err"):
            if os.path.exists(temporary + ending):
                os.unlink(temporary + ending)


def _write(path: str, value: dict) -> None:
    import json

    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as stream:
        json.dump(value, stream, sort_keys=True)
    os.replace(temporary, path)


def _compile(
    settings: dict, unit: dict, flags: list[tuple[str, ...]], path: str, temporary: str
) -> tuple[set[str], str, str]:
    """Flags that clang refused; and, where there is no bitcode, the kind of failure and why."""
    writer = settings["cxx" if unit["language"] == "c++" else "c"]
    dropped: set[str] = set()
    for _ in range(4):
        kept = [part for flag in flags if flag[0] not in dropped for part in flag]
        command = [*writer, *kept, "-g0", "-w"]
        command += [f"-Wno-error={name}" for name in _TOLERATED]
        command += [f"-ffile-prefix-map={settings['root']}=.", "-Xclang", "-disable-llvm-passes"]
        source = os.path.relpath(path)
        dependencies = [] if settings["zig"] else ["-MD", "-MF", temporary + ".d"]
        command += ["-emit-llvm", "-c", source, "-o", temporary + ".bc", *dependencies]
        status = _limited(command, temporary + ".err", settings["unit_s"])
        if status == 0 and settings["zig"]:  # it writes either bitcode or dependencies
            listing = [*writer, *kept, "-w", source, "-M"]
            _limited(listing, temporary + ".err", settings["unit_s"], temporary + ".d")
        if status is None:
            return dropped, "timeout", f"the front end took over {settings['unit_s']:g} s"
        if status == 0:
            return dropped, "", ""
        with open(temporary + ".err", encoding="utf-8", errors="replace") as stream:
            text = stream.read()
        refused = _refused(text, flags) - dropped
        if not refused:
            kind = "memory" if "out of memory" in text or "bad_alloc" in text else "compile"
            return dropped, kind, _shown(text, settings)[-2000:] or f"status {status}"
        dropped |= refused
    return dropped, "compile", f"flags refused again and again: {sorted(dropped)}"


def _limited(
    command: list[str], errors: str, seconds: float, output: str = os.devnull
) -> int | None:
    """Exit status, or None where the time ran out and the whole group was killed."""
    import signal

    def late(number: int, frame: object) -> None:
        raise TimeoutError

    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, output, os.O_WRONLY | os.O_CREAT, 0o600),
        (os.POSIX_SPAWN_OPEN, 2, errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
    ]
    before = signal.signal(signal.SIGALRM, late)
    child = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setpgroup=0)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except TimeoutError:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _refused(text: str, flags: list[tuple[str, ...]]) -> set[str]:
    """Flags that the driver's errors name, in whatever words."""
    import re

    found: set[str] = set()
    for line in text.splitlines():
        if not re.match(r"(\S*(clang|zig)\S*: )?error: ", line):
            continue
        for quoted in re.findall(r"'([^']+)'", line):
            ends = f"={quoted}"
            found |= {
                flag[0]
                for flag in flags
                if flag[0][:1] == "-"
                and flag[0][:2] not in ("-D", "-I", "-U", "-O")
                and (flag[0] == quoted or flag[0].endswith(ends) or _opens(flag[0], quoted))
            }
    return found


def _opens(flag: str, quoted: str) -> bool:
    return quoted[:1] == "-" and quoted[-1:] == "=" and flag.startswith(quoted)


def _includes(path: str, source: str, settings: dict) -> list[str]:
    """Files in a make rule less the source: relative inside the tree, absolute outside."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            text = stream.read()
    except OSError:
        return []
    text = text.partition(": ")[2].replace("\\\n", " ").replace("\\ ", "\0").replace("$$", "$")
    found = {os.path.realpath(part.replace("\0", " ").replace("\\#", "#")) for part in text.split()}
    found.discard(os.path.realpath(source))
    root = settings["root"] + "/"
    names = (os.path.relpath(part, root) if part.startswith(root) else part for part in found)
    return sorted(_shown(part, settings) for part in names)


def _shown(text: str, settings: dict) -> str:
    """Without the places that differ from machine to machine."""
    text = text.replace(settings["root"], ".")
    for prefix, alias in settings["aliases"]:
        text = text.replace(prefix, alias)
    return text


def _embedding(settings: dict, name: str, arguments: list[str]) -> list[str]:
    """The compile line in clang's hands; its object carries bitcode in section `.llvmbc`."""
    writer = settings["cxx" if "++" in name else "c"]
    extra = ["-Xclang", "-fembed-bitcode=all"] if "-c" in arguments else []
    return [*writer, *arguments, *extra, *(f"-Wno-error={one}" for one in _TOLERATED)]


def _keep_object(
    settings: dict, unit: dict, flags: list[tuple[str, ...]], path: str, temporary: str
) -> None:
    """Copy the object for `embed.py` to take apart, and list the headers."""
    import shutil

    shutil.copyfile(_output(sys.argv[1:], path), temporary + ".bc")
    writer = settings["cxx" if unit["language"] == "c++" else "c"]
    plain = [part for flag in flags for part in flag]
    listing = [*writer, *plain, "-w", os.path.relpath(path), "-M", "-MF", temporary + ".d"]
    _limited(listing, temporary + ".err", settings["unit_s"])


def _output(arguments: list[str], path: str) -> str:
    for index, argument in enumerate(arguments):
        if argument[:2] == "-o":
            return argument[2:] or arguments[index + 1]
    return os.path.basename(path).rpartition(".")[0] + ".o"


if __name__ == "__main__":
    sys.exit(main())
