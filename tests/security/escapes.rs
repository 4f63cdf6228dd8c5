//! Text of others that would do something to a terminal: wherever it comes from, it is shown and does nothing.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::process::Command;

use rustix::process::Signal;

use super::{ask, beside_worker, let_go};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::Running;
use crate::support::world::{Need, world};

/// Colours, a title, the same with one character (C1), text turned round: as `printf` of a shell writes them.
const PRINTF: &str = r"evil\033[31m\033]0;title\007\302\2335m\342\200\256\rEVIL";

/// Nothing in it acts on a terminal; what is in the second list stands for what would.
fn harmless(what: &str, text: &str) {
    let acts = |c: &char| c.is_control() && *c != '\n' || *c == '\u{202e}';
    assert_eq!(text.chars().find(acts), None, "{what}: {text:?}");
}

/// The same, and the text is there.
fn shown(what: &str, text: &str) {
    harmless(what, text);
    assert!(text.contains("evil") && text.contains("EVIL"), "{what}: {text}");
}

/// JSON is for programs, which may print it all the same: no character of it but the text turned round, which JSON and
/// its readers leave as it is.
fn shown_as_json(what: &str, text: &str) {
    shown(what, &text.replace('\u{202e}', ""));
}

#[test]
fn nothing_a_worker_says_acts_on_a_terminal() {
    world(&[Need::Python], |world| {
        let python = r"
evil = 'evil\x1b[31m\x1b]0;title\x07\x9b5m\u202e\rEVIL'
channel = socket.socket(fileno=int(os.environ['REUSEPORTD_CHANNEL']))
channel.send(b'error ' + evil.encode())
channel.send(b'evil\x1b[31m')
channel.send(evil.encode())
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.sendto(b'STATUS=' + evil.encode(), os.environ['NOTIFY_SOCKET'])
";
        let app = beside_worker(world, "--mode sdk", python).workers(1);
        let master = Master::start(world, &app);
        let_go(world);
        master.wait_status("told", |status| status.generations[0].workers[0].status.is_some());
        // As much of it as fits into the line.
        harmless("status", &master.cli("status").stdout);
        shown_as_json("status --json", &master.cli("status --json").stdout);

        let failing = format!("printf '{PRINTF}\\n' >&2; exit 3");
        App::new(world, ["/bin/sh", "-c", &failing]).workers(1).write();
        let upgrade = master.cli("upgrade --wait");
        assert_eq!(upgrade.code, 1);
        shown("upgrade", &upgrade.stderr);
        shown_as_json("upgrade --json", &master.cli("upgrade --wait --json").stdout);
        shown("status", &master.cli("status").stdout);
        shown("receipts", &master.cli("status --receipts").stdout);
        let log = master.log();
        shown_as_json("log", &log);
        assert!(log.contains("a worker reports an error") && log.contains("its last output"), "{log}");
        harmless(
            "what the service manager is told",
            &master.upstream.told().join("").replace('\u{202e}', ""),
        );
        master.stop();
    });
}

#[test]
fn no_name_acts_on_a_terminal() {
    world(&[], |world| {
        let evil = r"evil\u001b[31m\u001b]0;title\u0007\u009b5m\rEVIL";
        let app = App::test_worker(world, "--mode plain").workers(1);
        let master = Master::start(world, &app);
        let text = fs::read_to_string(&app.path).unwrap();
        for (key, changed) in [
            ("command", text.replace("command = [\"/", &format!("command = [\"/{evil}/"))),
            (
                "environment_file",
                text.replace("workers =", &format!("environment_file = \"/{evil}\"\nworkers =")),
            ),
            ("directory", text.replace("workers =", &format!("working_directory = \"/{evil}\"\nworkers ="))),
            ("unknown key", text.replace("workers =", &format!("\"{evil}\" = 1\nworkers ="))),
            ("name", text.replace("name = \"default\"", &format!("name = \"{evil}\""))),
        ] {
            assert_ne!(changed, text, "{key}");
            fs::write(&app.path, changed).unwrap();
            let check = master.cli("check");
            assert_ne!(check.code, 0, "{key}");
            shown(key, &check.stderr);
            let upgrade = ask(world, "upgrade --wait");
            assert_ne!(upgrade.code, 0, "{key}");
            shown(key, &upgrade.stderr);
            for words in ["status", "status --receipts"] {
                shown(words, &ask(world, words).stdout);
            }
        }
        harmless("log", &master.log());
        let path = world.path("").join(OsString::from_vec(b"evil\x1b[31m\xc2\x9b5m\xff\rEVIL".to_vec()));
        for (words, is_there) in [("check", false), ("check", true), ("status", true)] {
            if is_there {
                fs::write(&path, "[app]\nworkers = \"none\"\n").unwrap();
            }
            let mut command = Command::new(REUSEPORTD);
            command.arg(words).arg("--config").arg(&path);
            let done = Running::start(command).finish(PATIENCE);
            assert_ne!(done.code, 0);
            shown(words, &done.stderr);
            let mut command = Command::new(REUSEPORTD);
            command.args(["status", "--socket"]).arg(&path);
            shown("status --socket", &Running::start(command).finish(PATIENCE).stderr);
        }
        app.write();
        master.upgrade();
        master.stop();
    });
}

#[test]
fn a_strangers_name_does_not_act_on_a_terminal() {
    world(&[Need::Python], |world| {
        let app = App::test_worker(world, "--mode plain").workers(1);
        let master = Master::start(world, &app);
        let python = r"
import socket, sys
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listener.bind((sys.argv[1], int(sys.argv[2])))
listener.listen()
open('/proc/self/comm', 'w').write('evil\x1b[31mEVIL')
print('there', flush=True)
sys.stdin.read()
";
        let mut stranger = Command::new("python3");
        let (ip, port) = (world.address.ip().to_string(), world.address.port().to_string());
        stranger.args(["-c", python, &ip, &port, "evil\x1b[31m\u{9b}5m\rEVIL"]);
        let (pipe, stdin) = std::io::pipe().unwrap();
        let stranger = Running::start({
            stranger.stdin(pipe);
            stranger
        });
        master.wait_status("a stranger", |status| status.listeners[0].strangers == Some(1));
        // Of it only the beginning fits into the line.
        harmless("sockets", &master.cli("sockets").stdout);
        shown("sockets --json", &master.cli("sockets --json").stdout);
        harmless("status", &master.cli("status").stdout);
        drop(stdin);
        stranger.finish(PATIENCE);
        master.stop();
    });
}

#[test]
fn what_workers_print_does_not_act_on_the_masters_terminal() {
    world(&[Need::Runs("script", &["--version"])], |world| {
        let worker = crate::support::app::test_worker("--mode plain").join(" ");
        let line = format!("printf '{PRINTF}\\n'; exec {worker}");
        let app = App::new(world, ["/bin/sh", "-c", &line]).workers(1);
        // The terminal's output is what this prints, to a file.
        let mut command = Command::new("script");
        let master = format!("exec {REUSEPORTD} --config {}", app.path.display());
        command.args(["-q", "-c", &master, "/dev/null"]).env("NO_COLOR", "1");
        let mut master = Master::launch_by(world, &app, Command::new("true"), |_| {
            let out = fs::File::create(world.path("terminal")).unwrap();
            command.env("NOTIFY_SOCKET", world.path("notify.sock")).stdout(out);
            command.spawn().unwrap()
        });
        master.wait_ready();
        let pid = master.status().master.pid;
        crate::support::process::signal(pid, Signal::TERM);
        assert!(master.wait_end(PATIENCE).is_some());
        let shown_there = String::from_utf8(fs::read(world.path("terminal")).unwrap()).unwrap();
        shown_as_json("terminal", &shown_there.replace("\r\n", "\n"));
    });
}
