//! The config as its users meet it: the built binary, a file, what it says and how it exits.

use std::path::Path;
use std::process::{Command, Output};

/// A malformed file: its text, where the finding must be, and words that must be said. The lines of `GOOD` stand
/// around it, so that nothing else is wrong.
struct Case {
    text: &'static str,
    /// `line:column`.
    place: &'static str,
    says: &'static [&'static str],
}

const fn case(text: &'static str, place: &'static str, says: &'static [&'static str]) -> Case {
    Case { text, place, says }
}

/// `\n` separated; `@APP` and `@LISTEN` are two lines each that are fine.
const MALFORMED: &[Case] = &[
    // Syntax: all of it at once.
    case("[app\nname = \"a\"\n", "1:5", &["not valid TOML"]),
    case("@APP\nname = \"a\n@LISTEN\n", "3:10", &["not valid TOML"]),
    case("@APP\nworkers =\numask =\n@LISTEN\n", "3:10", &["not valid TOML", "4:8"]),
    case("@APP\ncommand = [\"/bin/other\"]\n@LISTEN\n", "3:1", &["duplicate key"]),
    // Shape: keys and types.
    case("@APP\ncomand = [\"a\"]\n@LISTEN\n", "3:1", &["app.comand", "did you mean `command`", "workers"]),
    case("@APP\n@LISTEN\nadress = \"a\"\n", "5:1", &["listen[0].adress", "did you mean `address`"]),
    case("[ap]\n", "1:2", &["unknown key `ap`", "did you mean `app`"]),
    case("@APP\nzebra = 1\n@LISTEN\n", "3:1", &["app.zebra", "known here: name, command"]),
    case("[app]\ncommand = \"/bin/web -q\"\n@LISTEN\n", "2:11", &["app.command", "expected an array"]),
    case("@APP\nno_new_privileges = \"yes\"\n@LISTEN\n", "3:21", &["app.no_new_privileges", "boolean"]),
    case("@APP\nenvironment = { PORT = 80 }\n@LISTEN\n", "3:24", &["app.environment.PORT", "string"]),
    case(
        "@APP\n@LISTEN\n[upgrade]\ndrain_timeout = 60\n",
        "6:17",
        &["upgrade.drain_timeout", "a string like \"250ms\""],
    ),
    // Meaning: one value.
    case("[app]\n@LISTEN\n", "1:1", &["app.command: missing", "for example"]),
    case("[app]\ncommand = []\n@LISTEN\n", "2:11", &["app.command: empty"]),
    case("@APP\n", "1:1", &["listen: missing", "[[listen]]"]),
    case("@APP\nname = \"My App\"\n@LISTEN\n", "3:8", &["app.name", "a-z 0-9 _ -"]),
    case("@APP\nworkers = 0\n@LISTEN\n", "3:11", &["app.workers", "from 1 to 1024"]),
    case("@APP\nworkers = \"all\"\n@LISTEN\n", "3:11", &["app.workers", "\"cpus\""]),
    case("@APP\numask = \"0999\"\n@LISTEN\n", "3:9", &["app.umask", "octal"]),
    case(
        "@APP\nuser = \"no-such-user\"\n@LISTEN\n",
        "3:8",
        &["app.user: there is no user", "user name or uid"],
    ),
    case("@APP\ngroup = -1\n@LISTEN\n", "3:9", &["app.group: there is no group -1", "group name or gid"]),
    case(
        "@APP\ncapabilities = [\"NET_BIND_SERVCE\"]\n@LISTEN\n",
        "3:17",
        &["app.capabilities[0]", "did you mean `CAP_NET_BIND_SERVICE`"],
    ),
    case("@APP\nstop_signal = \"SIGKILL\"\n@LISTEN\n", "3:15", &["app.stop_signal", "no chance"]),
    case("@APP\nlimits = { nofiles = 1 }\n@LISTEN\n", "3:22", &["app.limits.nofiles", "`nofile`"]),
    case("@APP\n@LISTEN\nbacklog = 0\n", "5:11", &["listen[0].backlog", "from 1 to 2147483647"]),
    case("@APP\n[[listen]]\naddress = \"localhost:80\"\n", "4:11", &["listen[0].address", "127.0.0.1:80"]),
    case("@APP\n[[listen]]\naddress = \"0.0.0.0:0\"\n", "4:11", &["listen[0].address", "port 0"]),
    case(
        "@APP\n@LISTEN\n[steering]\nengine = \"epbf\"\n",
        "6:10",
        &["steering.engine", "did you mean `ebpf`"],
    ),
    case("@APP\n@LISTEN\n[restart]\nbackoff = \"1d\"\n", "6:11", &["restart.backoff", "\"250ms\""]),
    case(
        "@APP\n@LISTEN\n[upgrade]\nready_timeout = \"-5s\"\n",
        "6:17",
        &["upgrade.ready_timeout", "negative"],
    ),
    case(
        "@APP\n@LISTEN\n[upgrade]\ncanary = [{ share = \"200%\" }]\n",
        "6:21",
        &["upgrade.canary[0].share", "100%", "upgrade.canary[0].hold: missing"],
    ),
    case(
        "@APP\n@LISTEN\n[upgrade]\ncanary = [{ share = 5, hold = \"1s\" }]\n",
        "6:21",
        &["upgrade.canary[0].share", "expected a string", "steps of 0.1%"],
    ),
    case(
        "@APP\n@LISTEN\n[upgrade]\ncanary = [{ share = \"5%\", hodl = \"1s\" }]\n",
        "6:27",
        &["upgrade.canary[0].hodl", "did you mean `hold`"],
    ),
    case("@APP\n@LISTEN\n[upgrade]\nbatch = \"5%\"\n", "6:9", &["upgrade.batch", "from 1 to 1024"]),
    case("@APP\n@LISTEN\n[watchdog]\ntimeout = \"99ms\"\n", "6:11", &["watchdog.timeout", "100ms or more"]),
    case("@APP\n@LISTEN\n[control]\nallow_users = [\"nobody-here\"]\n", "6:16", &["control.allow_users[0]"]),
    case("[log]\n", "1:1", &["app.command: missing", "listen: missing"]),
    // Meaning: keys that must agree.
    case(
        "[app]\ncommand = [\"/bin/web\", \"{port.htpp}\"]\n[[listen]]\nname = \"http\"\naddress = \"[::1]:80\"\n",
        "2:24",
        &["app.command[1]", "did you mean `port.http`"],
    ),
    case("@APP\n@LISTEN\n@LISTEN\n", "5:1", &["listen[1].name", "listen[1].address", "overlap"]),
    case(
        "@APP\n@LISTEN\n[[listen]]\nname = \"b\"\naddress = \"0.0.0.0:8080\"\n",
        "7:11",
        &["listen[1].address", "127.0.0.1:8080", "wildcard"],
    ),
    case(
        "@APP\n@LISTEN\n[upgrade]\nsettle_timeout = \"6s\"\ndrain_timeout = \"5s\"\n",
        "6:18",
        &["upgrade.settle_timeout", "upgrade.drain_timeout"],
    ),
    case(
        "@APP\n@LISTEN\n[restart]\nbackoff = \"11s\"\n",
        "6:11",
        &["restart.backoff", "restart.backoff_max"],
    ),
    case(
        "@APP\n@LISTEN\n[upgrade]\nbatch = 1\nbake = \"5s\"\n",
        "6:9",
        &["upgrade.batch", "upgrade.bake", "steer back to"],
    ),
    case("@APP\n@LISTEN\n[upgrade]\ncheck = [\"a\"]\n", "6:9", &["upgrade.check: would never run"]),
    case(
        "@APP\n[[listen]]\naddress = \"unix:/run/w.sock\"\n",
        "4:11",
        &["listen[0].bind: a path can be bound once only", "set bind = \"master\""],
    ),
    // Not yet.
    case(
        "@APP\n[console]\nlisten = \"127.0.0.1:9180\"\n@LISTEN\n",
        "4:10",
        &["console.listen: not supported yet"],
    ),
];

const APP: &str = "[app]\ncommand = [\"/bin/sleep\", \"60\"]";
const LISTEN: &str = "[[listen]]\naddress = \"127.0.0.1:8080\"";

/// Runs the binary with a runtime directory of its own, where a master would leave its socket.
fn run(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_reuseportd"))
        .args(arguments)
        .current_dir(directory)
        .env("RUNTIME_DIRECTORY", directory.join("run"))
        .env("NO_COLOR", "1")
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Exit code 2, a message and nothing else: no panic, no output, no master.
fn assert_refused(directory: &Path, text: &str, arguments: &[&str]) -> String {
    let output = run(directory, arguments);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}\n{said}");
    assert!(output.stdout.is_empty(), "{text}");
    assert!(!said.contains("panicked") && !said.contains('\u{1b}'), "{text}\n{said}");
    assert!(!directory.join("run").exists(), "a master was started for\n{text}");
    said
}

#[test]
fn malformed_files_are_refused_with_place_key_and_remedy() {
    let directory = tempfile::tempdir().unwrap();
    for Case { text, place, says } in MALFORMED {
        let text = text.replace("@APP", APP).replace("@LISTEN", LISTEN);
        std::fs::write(directory.path().join("app.toml"), &text).unwrap();
        for arguments in [&["--config", "app.toml"][..], &["check", "--config", "app.toml"]] {
            let said = assert_refused(directory.path(), &text, arguments);
            assert!(said.contains(&format!("app.toml:{place}\n")), "{place} expected:\n{text}\n{said}");
            for word in *says {
                assert!(said.contains(word), "{word:?} expected:\n{text}\n{said}");
            }
        }
    }
}

#[test]
fn what_is_no_config_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| std::fs::write(directory.path().join(name), bytes).unwrap();
    file("empty.toml", b"\n");
    file("latin1.toml", b"[app]\nname = \"caf\xe9\"\n");
    file("huge.toml", &vec![b'#'; (1 << 20) + 1]);
    file(
        "deep.toml",
        "a = ".bytes().chain(std::iter::repeat_n(b'[', 100_000)).collect::<Vec<_>>().as_slice(),
    );
    file("garbage.toml", "= [\n\"\n".repeat(100_000).as_bytes());
    for (path, says) in [
        ("absent.toml", "cannot read the file"),
        (".", "is a directory"),
        ("/dev/null", "not a regular file"),
        ("empty.toml", "the file is empty"),
        ("latin1.toml", "latin1.toml:2:12"),
        ("huge.toml", "larger than 1 MiB"),
        ("deep.toml", "deep.toml:1:85"),
        ("garbage.toml", "garbage.toml:1:1"),
    ] {
        let said = assert_refused(directory.path(), path, &["--config", path]);
        assert!(said.contains(says) && said.contains(path), "{path}\n{said}");
        assert!(said.len() < 100_000, "{path}: {} bytes", said.len());
    }
}

#[test]
fn all_findings_are_told_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let text = "[app]\ncommand = []\nworkers = 0\n[[listen]]\naddress = \"x\"\n[log]\nlevel = \"loud\"\n";
    std::fs::write(directory.path().join("app.toml"), text).unwrap();
    let said = assert_refused(directory.path(), text, &["check", "--config", "app.toml"]);
    for word in ["app.command", "app.workers", "listen[0].address", "log.level"] {
        assert!(said.contains(word), "{word}\n{said}");
    }
    assert_eq!(said.matches("error: ").count(), 4, "{said}");
}

#[test]
fn check_approves_what_can_run_and_says_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    // The port is taken: check must neither mind nor disturb it.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let listen = format!("[[listen]]\naddress = \"{address}\"\nbacklog = 2000000000");
    let upgrade = "[upgrade]\nbake = \"1s\"\ncheck = [\"/bin/true\", \"{generation}\"]";
    let text = format!("{APP}\nname = \"shop\"\n{listen}\n{upgrade}\n");
    std::fs::write(directory.path().join("app.toml"), text).unwrap();
    let output = run(directory.path(), &["check", "--config", "app.toml"]);
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let check = "check    /bin/true \"1\"";
    for word in
        ["app.toml: ok", "shop", "/bin/sleep", "\"60\"", &address.to_string(), "run/control.sock", check]
    {
        assert!(said.contains(word), "{word}\n{said}");
    }
    assert!(stderr(&output).contains("sysctl -w net.core.somaxconn=2000000000"), "{}", stderr(&output));
    assert!(!directory.path().join("run").exists());
}

#[test]
fn check_finds_what_this_machine_cannot_run() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("plain"), "").unwrap();
    std::fs::write(directory.path().join("bad.env"), "A=1\nexport B=2\n").unwrap();
    for (app, address, says) in [
        ("command = [\"/nonexistent/web\"]", "127.0.0.1:80", "app.command: /nonexistent/web"),
        ("command = [\"no-such-program\"]", "127.0.0.1:80", "in no directory of PATH"),
        ("command = [\"sleep 60\"]", "127.0.0.1:80", "there is no shell"),
        ("command = [\"./plain\"]", "127.0.0.1:80", "not executable"),
        (
            "command = [\"sleep\"]\nworking_directory = \"/nonexistent\"",
            "127.0.0.1:80",
            "app.working_directory",
        ),
        (
            "command = [\"sleep\"]\nenvironment_file = \"/nonexistent\"",
            "127.0.0.1:80",
            "app.environment_file",
        ),
        ("command = [\"sleep\"]\nenvironment_file = \"bad.env\"", "127.0.0.1:80", "bad.env, line 2"),
        ("command = [\"sleep\"]", "192.0.2.1:80", "no interface here has it"),
        (
            "command = [\"sleep\"]\n[upgrade]\nbake = \"1s\"\ncheck = [\"./plain\"]",
            "127.0.0.1:80",
            "upgrade.check: ",
        ),
    ] {
        let text = format!("[app]\n{app}\n[[listen]]\naddress = \"{address}\"\n");
        std::fs::write(directory.path().join("app.toml"), &text).unwrap();
        let output = run(directory.path(), &["check", "--config", "app.toml"]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{text}\n{said}");
        assert!(said.contains(says) && !said.contains("panicked"), "{text}\n{said}");
    }
}

#[test]
fn wrong_usage_exits_2_and_help_0() {
    let directory = tempfile::tempdir().unwrap();
    for wrong in
        [&[][..], &["frobnicate"], &["check"], &["--socket", "/s"], &["upgrade", "--timeout", "5", "--wait"]]
    {
        assert_eq!(run(directory.path(), wrong).status.code(), Some(2), "{wrong:?}");
    }
    for fine in [&["--help"][..], &["--version"], &["upgrade", "--help"]] {
        assert_eq!(run(directory.path(), fine).status.code(), Some(0), "{fine:?}");
    }
}
