//! A program that is not trusted with the state: nothing changes, and the reason is told.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;

use super::{Program, executes, reexec, workers};
use crate::support::app::App;
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{Done, Running, signal, wait_gone};
use crate::support::world::{Need, World, repository, tool, world};
use crate::support::{PATIENCE, rounds};

/// Asks for a re-exec, which must be refused in these words, and demands that nothing else comes of it.
fn assert_refused(master: &Master, words: &[&str]) {
    let (before, program, mark) = (master.status(), executes(master.pid()), master.upstream.mark());
    let done = master.cli("reexec");
    assert_eq!((done.code, done.stdout.as_str()), (1, ""), "{done:#?}\n{}", master.log());
    let reason = done.stderr.trim().strip_prefix("error: ").expect("an error is called one").to_owned();
    for word in words {
        assert!(reason.contains(word), "{word:?} is not in {reason:?}");
    }
    let status = format!("STATUS=no re-exec: {reason}");
    assert!(master.upstream.wait(mark, &status, PATIENCE).is_some(), "{:#?}", master.upstream.told());
    let log = master.log();
    let told = |line: &&str| line.contains("event=\"reexec_refused\"") && line.contains(words[0]);
    assert!(log.lines().any(|line| told(&line)), "{log}");
    let after = master.status();
    assert_eq!((after.master.reexecs, executes(master.pid())), (0, program));
    assert_eq!((workers(&after), after.state), (workers(&before), before.state));
}

#[test]
fn what_does_not_read_the_state_is_not_executed() {
    world(&[], |world| {
        let program = Program::new(world);
        let master = program.start(world, &App::test_worker(world, "--mode sdk").workers(2));
        let scripts: [(&str, &[&str]); 5] = [
            ("echo 'these are' >&2; echo 'its words' >&2; exit 1", &["these are | its words", "status 1"]),
            ("exit 0", &["another program"]),
            ("echo understood; exit 0", &["another program"]),
            ("kill -KILL $$", &["signal 9"]),
            ("exec /nonexistent/program", &["status 127", "not found"]),
        ];
        for (script, words) in scripts {
            program.become_script(script);
            assert_refused(&master, words);
        }
        let plain = repository("README.md");
        let others: [(&Path, &str, &str); 5] = [
            (Path::new("/bin/false"), "755", "status 1"),
            (Path::new("/bin/true"), "755", "another program"),
            (Path::new("/bin/cat"), "755", "status 1"),
            (&plain, "755", "Exec format error"),
            (Path::new(REUSEPORTD), "644", "Permission denied"),
        ];
        for (other, mode, word) in others {
            program.become_copy(other, mode);
            assert_refused(&master, &[word]);
        }
        fs::remove_file(&program.path).unwrap();
        assert_refused(&master, &["No such file", &program.path.display().to_string()]);
        fs::create_dir(&program.path).unwrap();
        assert_refused(&master, &["Permission denied"]);
        fs::remove_dir(&program.path).unwrap();
        // After all of that the master is as able as before.
        program.link_to(Path::new(REUSEPORTD));
        reexec(&master);
        master.upgrade();
        master.stop();
    });
}

/// Starts something and waits for it, for ever.
fn hangs(world: &World) -> String {
    format!("sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait", world.path("sleeper").display())
}

/// The process that such a program has started.
fn sleeper(world: &World, master: &Master) -> u32 {
    let path = world.path("sleeper");
    master.wait_status("reading the state", |_| path.exists());
    let pid = fs::read_to_string(&path).unwrap().trim().parse().unwrap();
    fs::remove_file(path).unwrap();
    pid
}

#[test]
fn a_program_that_hangs_is_ended() {
    world(&[], |world| {
        let program = Program::new(world);
        let mut app = App::test_worker(world, "--mode plain").workers(2);
        let master = program.start(world, &app);
        program.become_script(&hangs(world));
        let waiting = master.begin("reexec");
        let started = sleeper(world, &master);
        // The service goes on meanwhile, and who asks too waits for the same answer.
        let other = master.begin("reexec");
        master.signal(Signal::USR2);
        app.command.push("--inline".into());
        app.write();
        assert_eq!(master.upgrade().to, Some(2));
        for waiting in [waiting, other] {
            let done = waiting.finish(PATIENCE);
            assert_eq!(done.code, 1, "{done:#?}");
            assert!(done.stderr.contains("did not read the state in time"), "{done:#?}");
        }
        wait_gone(started, PATIENCE);
        assert!(!world.path("sleeper").exists(), "a second one has been started beside the first");
        // A stop waits for nobody like that.
        let waiting = master.begin("reexec");
        let started = sleeper(world, &master);
        master.stop();
        wait_gone(started, PATIENCE);
        let done = waiting.finish(PATIENCE);
        assert!(done.code == 1 && done.stderr.contains("the service is stopping"), "{done:#?}");
    });
}

#[test]
fn a_program_that_is_killed_is_refused() {
    world(&[], |world| {
        let program = Program::new(world);
        let master = program.start(world, &App::test_worker(world, "--mode plain").workers(1));
        program.become_script(&hangs(world));
        let waiting = master.begin("reexec");
        let started = sleeper(world, &master);
        let stat = fs::read_to_string(format!("/proc/{started}/stat")).unwrap();
        let parent = stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap();
        signal(parent, Signal::TERM);
        let done = waiting.finish(PATIENCE);
        assert!(done.code == 1 && done.stderr.contains("signal 15"), "{done:#?}");
        wait_gone(started, PATIENCE);
        master.stop();
    });
}

/// The state as a new program is given it, from a master in the middle of everything.
fn state(world: &World) -> Vec<u8> {
    let program = Program::new(world);
    let master = program.start(world, &App::test_worker(world, "--mode sdk").workers(2));
    master.upgrade();
    let path = world.path("state");
    program.become_script(&format!("cat <&3 > {}; exit 1", path.display()));
    assert_refused(&master, &["status 1"]);
    master.stop();
    fs::read(path).unwrap()
}

/// What the program says about a state.
fn preflight(world: &World, state: &[u8]) -> Done {
    let path = world.path("tried");
    fs::write(&path, state).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" preflight 3<\"$1\"", REUSEPORTD]).arg(path);
    Running::start(command).finish(PATIENCE)
}

#[test]
fn a_state_that_is_not_understood_is_refused() {
    world(&[], |world| {
        let state = state(world);
        let done = preflight(world, &state);
        assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{done:#?}");
        tool(&format!("cp {} {}", world.path("tried").display(), world.path("whole").display()));
        let mut sum = Command::new("sha256sum");
        sum.arg(world.path("whole"));
        let sum = Running::start(sum).finish(PATIENCE).stdout;
        assert_eq!(done.stdout.trim(), format!("understood {}", sum.split(' ').next().unwrap()));

        let text = String::from_utf8(state.clone()).unwrap();
        let newer = text.replacen("{\"snapshot\":1,\"by\":\"", "{\"snapshot\":2,\"by\":\"9.", 1);
        assert_ne!(newer, text);
        let done = preflight(world, newer.as_bytes());
        assert_eq!((done.code, done.stdout.as_str()), (1, ""), "{done:#?}");
        for word in ["by version 9.", "form 2", "does not know"] {
            assert!(done.stderr.contains(word), "{done:#?}");
        }

        // Torn anywhere. The head in every place, the rest of it in some.
        let step = if rounds(0, 1) == 1 { 1 } else { state.len() / 100 };
        let head = state.iter().position(|byte| *byte == b'\n').unwrap();
        let ends = (0..head).step_by(step.min(10)).chain((head..state.len()).step_by(step));
        for end in ends.chain([head + 1, state.len() - 1]) {
            let done = preflight(world, &state[..end]);
            assert!(done.code == 1 && done.stderr.lines().count() == 1, "{end}: {done:#?}");
        }
        // Garbled anywhere it may pass by chance, but never ends in a panic.
        for at in (0..state.len()).step_by(step) {
            let mut garbled = state.clone();
            garbled[at] = if garbled[at].is_ascii_digit() { b'9' } else { b'~' };
            let done = preflight(world, &garbled);
            assert!(matches!(done.code, 0 | 1) && done.stderr.lines().count() <= 1, "{at}: {done:#?}");
        }
        // Without any, by hand.
        let mut command = Command::new(REUSEPORTD);
        command.arg("preflight");
        let done = Running::start(command).finish(PATIENCE);
        assert_eq!((done.code, done.stdout.as_str()), (1, ""), "{done:#?}");
    });
}

#[test]
fn a_state_that_was_not_carried_is_not_resumed() {
    world(&[], |world| {
        // Whoever inherits the variable by mistake has no such descriptor.
        let app = App::test_worker(world, "--mode plain");
        app.write();
        for number in ["77", "0", "-1", "nonsense", ""] {
            let mut command = Command::new(REUSEPORTD);
            command.arg("--config").arg(&app.path).env("REUSEPORTD_RESUME", number);
            let done = Running::start(command).finish(PATIENCE);
            assert_eq!(done.code, 1, "{number:?}: {done:#?}");
            assert!(done.stderr.contains("cannot go on after the re-exec"), "{number:?}: {done:#?}");
        }
    });
}

#[test]
fn the_client_says_how_it_went() {
    world(&[Need::Root], |world| {
        let program = world.path("client");
        tool(&format!("install -m 755 {REUSEPORTD} {}", program.display()));
        let socket = world.path("run/control.sock");
        let ask = |uid: u32| {
            let mut command = Command::new(&program);
            command.args(["reexec", "--socket"]).arg(&socket).uid(uid).gid(uid);
            Running::start(command).finish(PATIENCE)
        };
        assert_eq!(ask(0).code, 3, "no master");
        let mut app = App::test_worker(world, "--mode plain").workers(1);
        app.control = vec!["mode = \"0666\"".into(), "allow_users = [1234]".into()];
        app.write();
        let mut command = Command::new(REUSEPORTD);
        command.args(["reexec", "--config"]).arg(&app.path);
        assert_eq!(Running::start(command).finish(PATIENCE).code, 3, "no master");

        let master = Master::start(world, &app);
        assert_eq!(master.cli("reexec").code, 0); // by --config
        assert_eq!((ask(0).code, ask(1234).code), (0, 0));
        let refused = ask(1235);
        assert!(refused.code == 1 && refused.stderr.contains("not allowed"), "{refused:#?}");
        assert_eq!(master.status().master.reexecs, 3);
        let mut both = Command::new(REUSEPORTD);
        both.args(["reexec", "--config"]).arg(&app.path).arg("--socket").arg(&socket);
        assert_eq!(Running::start(both).finish(PATIENCE).code, 2);
        master.stop();
    });
}
