//! The generation before comes back: its program, its config, its surroundings, whatever has become of their files.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reuseportd_wire::status::{MasterState, Outcome, Phase, Receipt, Status, Trigger};
use rustix::process::Signal;

use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::client::Held;
use crate::support::load::{Load, slow_accepts, spec};
use crate::support::master::Master;
use crate::support::process::{keepers_of, kill, processes_of, state_of};
use crate::support::world::{World, example, needs_of, tool, world};
use crate::upgrade::control_loses;

/// A file, whatever its name.
type Identity = (u64, u64);

fn identity(path: &Path) -> Identity {
    let file = fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    (file.dev(), file.ino())
}

/// The worker's program at a path of the test's own, where others take its place.
struct Program {
    path: PathBuf,
    next: PathBuf,
}

impl Program {
    fn new(world: &World) -> Program {
        let program = Program { path: world.path("server"), next: world.path("server.next") };
        program.copy_to(&program.path);
        program
    }

    /// Another file each time; it works alike. By another process: what this one has open for writing, a child that is
    /// just being forked by another thread may have open too, and then nobody can execute it.
    fn copy_to(&self, path: &Path) {
        tool(&format!("install -m 755 {} {}", example("test_worker").display(), path.display()));
    }

    fn become_another_by_rename(&self) {
        self.copy_to(&self.next);
        fs::rename(&self.next, &self.path).unwrap();
    }

    fn become_another_by_copy(&self) {
        fs::remove_file(&self.path).unwrap();
        self.copy_to(&self.path);
    }

    /// The app that runs it.
    fn app(&self, world: &World, options: &str) -> App {
        let mut app = App::test_worker(world, options);
        app.command[0] = self.path.to_str().unwrap().into();
        app
    }

    fn file(&self) -> Identity {
        identity(&self.path)
    }
}

/// A rollback that must succeed; back when the generation before has no process any more.
fn rollback(master: &Master) -> Receipt {
    let from = master.status().active_generation;
    let (code, receipt) = master.receipt(master.cli("rollback --wait=drained --json"));
    assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}\n{}", master.log());
    assert_eq!((receipt.trigger, receipt.from), (Trigger::Rollback, from), "{receipt:#?}");
    let status = master.status();
    assert_eq!(status.active_generation, receipt.to, "{status:#?}");
    receipt
}

/// What every process of the app runs.
fn running(master: &Master) -> BTreeSet<Identity> {
    let processes = processes_of(master.app());
    assert!(!processes.is_empty());
    processes.iter().map(|process| identity(Path::new(&format!("/proc/{}/exe", process.pid)))).collect()
}

/// A rollback under load, and who answers then runs this.
fn brings_back(master: &Master, load: &Load, program: Identity) {
    let receipt = rollback(master);
    assert_eq!(running(master), [program].into(), "not the program it was:\n{}", master.log());
    load.answered_by(receipt.to.expect("of a completed rollback"));
}

fn upgrades_to(master: &Master, load: &Load, program: &Program) -> Identity {
    let receipt = master.upgrade();
    assert_eq!(running(master), [program.file()].into());
    load.answered_by(receipt.to.expect("of a completed upgrade"));
    program.file()
}

fn programs_come_back(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let program = Program::new(world);
        let app = program.app(world, &format!("--mode {mode} --accept-delay 5")).engine(engine);
        let mut master = Master::start(world, &app);
        let load = Load::start(slow_accepts(world));
        let first = program.file();

        program.become_another_by_rename();
        let second = upgrades_to(&master, &load, &program);
        assert_ne!(first, second);
        brings_back(&master, &load, first);
        // There and back again.
        brings_back(&master, &load, second);
        brings_back(&master, &load, first);

        program.become_another_by_copy();
        let third = upgrades_to(&master, &load, &program);
        brings_back(&master, &load, first);

        // Nothing is left of the file, nor of the config that led to it.
        fs::remove_file(&program.path).unwrap();
        app.write_invalid();
        brings_back(&master, &load, third);

        // The next image of the master holds it, and the next master.
        assert_eq!(master.cli("reexec").code, 0, "{}", master.log());
        brings_back(&master, &load, first);
        // A master needs a config it can read to start with; this one names a program that is not there.
        app.write();
        master.kill();
        master.restart();
        master.wait_adopted();
        brings_back(&master, &load, third);
        load.end_lossless();

        kill(master.serving().first().copied());
        master.wait_status("filled again", |_| master.serving().len() == 4);
        assert_eq!(running(&master), [third].into(), "a respawn runs another program");
        master.stop();
    });
}

#[test]
fn programs_come_back_sdk_ebpf() {
    programs_come_back("ebpf", "sdk");
}

#[test]
fn programs_come_back_unmodified_ebpf() {
    programs_come_back("ebpf", "plain");
}

#[test]
fn programs_come_back_sdk_cbpf() {
    programs_come_back("cbpf", "sdk");
}

#[test]
fn programs_come_back_unmodified_cbpf() {
    programs_come_back("cbpf", "plain");
}

#[test]
fn the_same_load_shows_losses() {
    world(&[], |world| control_loses(world, slow_accepts(world), 5));
}

/// The arguments and the variables of every serving worker; they have to be the same.
fn surroundings(master: &Master) -> (Vec<String>, BTreeSet<String>) {
    let strings = |path: String| {
        let text = fs::read_to_string(path).unwrap();
        text.split_terminator('\0').map(str::to_owned).collect::<Vec<String>>()
    };
    let of = |pid: u32| {
        let all = strings(format!("/proc/{pid}/environ"));
        let own = all.into_iter().filter(|variable| variable.starts_with("SERVER_")).collect();
        (strings(format!("/proc/{pid}/cmdline")), own)
    };
    let mut all: Vec<_> = master.serving().into_iter().map(of).collect();
    all.dedup();
    assert_eq!(all.len(), 1, "{all:#?}");
    all.remove(0)
}

/// Whether somebody accepts connections there.
fn is_served(address: SocketAddr) -> bool {
    match TcpStream::connect_timeout(&address, PATIENCE) {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => false,
        Err(error) => panic!("{address}: {error}"),
    }
}

/// Everything that a config can say otherwise, and what the workers are then.
fn configs_come_back(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let file = world.path("server.env");
        let [removed, added] =
            [1, 2].map(|more| SocketAddr::new(world.address.ip(), world.address.port() + more));
        let mut app =
            App::test_worker(world, &format!("--mode {mode} --accept-delay 5 --code 1")).engine(engine);
        app.listen.push(("removed".into(), removed));
        let others = app.app.len();
        app.app.push(format!("environment_file = {file:?}"));
        app.app.push("environment = { SERVER_A = \"1\" }".into());
        fs::write(&file, "SERVER_FILE=first\n").unwrap();
        let master = Master::start(world, &app);
        let load = Load::start(slow_accepts(world));
        let first = surroundings(&master);
        let expected = ["SERVER_A=1", "SERVER_FILE=first"].map(str::to_owned);
        assert_eq!(first, (app.command.clone(), expected.into()));

        let mut other = app.clone().workers(2);
        other.command = test_worker(&format!("--mode {mode} --accept-delay 2 --code 2"));
        other.app.truncate(others);
        other.app.push(format!("environment_file = {file:?}"));
        other.app.push("environment = { SERVER_B = \"2\" }".into());
        other.listen.pop();
        other.listen.push(("added".into(), added));
        fs::write(&file, "SERVER_FILE=second\n").unwrap();
        other.write();
        load.answered_by(master.upgrade().to.expect("of a completed upgrade"));
        let second = surroundings(&master);
        let expected = ["SERVER_B=2", "SERVER_FILE=second"].map(str::to_owned);
        assert_eq!(second, (other.command.clone(), expected.into()));
        assert_eq!([removed, added].map(is_served), [false, true]);

        // Neither the file of variables nor the config is what it was.
        fs::write(&file, "SERVER_FILE=third\n").unwrap();
        let places = [(&first, [true, false], 4), (&second, [false, true], 2), (&first, [true, false], 4)];
        for (before, served, workers) in places {
            load.answered_by(rollback(&master).to.expect("of a completed rollback"));
            assert_eq!(&surroundings(&master), before, "{}", master.log());
            assert_eq!([removed, added].map(is_served), served);
            assert_eq!(master.serving().len(), workers);
        }
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn configs_come_back_unmodified_ebpf() {
    configs_come_back("ebpf", "plain");
}

#[test]
fn configs_come_back_sdk_cbpf() {
    configs_come_back("cbpf", "sdk");
}

/// A generation that has served needs no trial, and whoever wants it back wants it now.
fn no_trial(engine: &'static str) {
    world(needs_of(engine), |world| {
        let app = App::test_worker(world, "--accept-delay 5").engine(engine);
        let tried = app
            .clone()
            .upgrade("canary = [{ share = \"5%\", hold = \"1h\" }]")
            .upgrade("bake = \"1h\"")
            .upgrade("check = [\"/bin/false\"]");
        let master = Master::start(world, &tried);
        let load = Load::start(slow_accepts(world));
        app.write();
        load.answered_by(master.upgrade().to.expect("of a completed upgrade"));
        let receipt = rollback(&master);
        load.answered_by(receipt.to.expect("of a completed rollback"));
        let phases: Vec<Phase> = receipt.phases.iter().map(|time| time.phase).collect();
        assert_eq!(
            phases,
            [Phase::Launching, Phase::Switch, Phase::Retiring, Phase::Draining],
            "{receipt:#?}"
        );
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn no_trial_ebpf() {
    no_trial("ebpf");
}

#[test]
fn no_trial_cbpf() {
    no_trial("cbpf");
}

/// Refused with this reason, in words and as a receipt, and nothing has changed.
fn refused(master: &Master, reason: &str) {
    let [before, workers] = [master.status(), master.status()];
    let before = (before.active_generation, before.state, workers.generations);
    for words in ["rollback --wait", "rollback"] {
        let done = master.cli(words);
        assert_eq!((done.code, done.stdout.as_str()), (1, ""), "{done:#?}\n{}", master.log());
        assert!(done.stderr.contains(reason), "{reason:?} is not in {done:#?}");
    }
    let (code, receipt) = master.receipt(master.cli("rollback --wait --json"));
    let text = receipt.reason.as_deref().unwrap_or_default();
    assert!(text.contains(reason), "{receipt:#?}");
    assert_eq!(
        (code, receipt.outcome, receipt.trigger),
        (1, Outcome::Refused, Trigger::Rollback),
        "{receipt:#?}"
    );
    assert_eq!((receipt.from, receipt.to), (before.0, None), "{receipt:#?}");
    let status = master.status();
    assert_eq!((status.active_generation, status.state), (before.0, before.1));
    let pids = |generations: &[reuseportd_wire::status::GenerationStatus]| {
        let workers = generations.iter().flat_map(|one| &one.workers);
        workers.map(|worker| worker.pid).collect::<Vec<_>>()
    };
    assert_eq!(pids(&status.generations), pids(&before.2));
    assert_eq!(status.last_upgrade, Some(receipt));
}

#[test]
fn there_may_be_none_before() {
    world(&[], |world| {
        let app = App::test_worker(world, "");
        let master = Master::start(world, &app);
        refused(&master, "no generation before");
        // One that never served is none, and one that was taken back is none.
        let mut broken = app.clone();
        broken.command = test_worker("--fail exit-before-ready");
        broken.write();
        assert_eq!(master.failing_upgrade().0, 1);
        refused(&master, "no generation before");
        app.write();
        master.upgrade();
        let done = master.cli("rollback");
        assert_eq!((done.code, done.stdout.as_str()), (0, "rollback accepted\n"), "{done:#?}");
        master.wait_status("back", |status| {
            status.state == MasterState::Steady && status.active_generation == Some(4)
        });
        master.stop();
    });
}

#[test]
fn what_was_found_without_a_master_does_not_come_back() {
    world(&[], |world| {
        let app = App::test_worker(world, "");
        let mut master = Master::start(world, &app);
        // Neither can replace the other.
        master.signal(Signal::STOP);
        kill(keepers_of(master.app()));
        master.kill();
        master.restart();
        let is_replaced =
            |status: &Status| status.state == MasterState::Steady && status.generations.len() == 1;
        master.wait_adopted();
        master.wait_status("upgraded away from", is_replaced);
        assert_eq!(master.status().last_upgrade.map(|receipt| receipt.trigger), Some(Trigger::Orphans));
        refused(&master, "no generation before");
        master.upgrade();
        rollback(&master);
        master.stop();
    });
}

/// Scripts can't be held: the interpreter loads what is at the path.
#[test]
fn a_script_comes_back_while_it_is_the_same() {
    world(&[], |world| {
        let script = world.path("server.sh");
        let write = |comment: &str| {
            let next = world.path("server.next");
            fs::write(
                &next,
                format!("#!/bin/sh\n# {comment}\nexec {} \"$@\"\n", example("test_worker").display()),
            )
            .unwrap();
            tool(&format!("install -m 755 {} {}.new", next.display(), script.display()));
            fs::rename(script.with_extension("sh.new"), &script).unwrap();
        };
        write("the first");
        let mut app = App::test_worker(world, "--code 1");
        app.command[0] = script.to_str().unwrap().into();
        let master = Master::start(world, &app);
        let mut other = app.clone();
        other.command = test_worker("--code 2");
        other.write();
        master.upgrade();
        let warnings = |master: &Master| master.log().matches("event=\"not_pinned\"").count();
        let before = warnings(&master);
        rollback(&master);
        assert_eq!(surroundings(&master).0[1..], app.command[1..], "{}", master.log());
        assert_eq!(warnings(&master), before + 1, "{}", master.log());
        // Forth, to what can be held, and then the way back is closed.
        rollback(&master);
        write("the second");
        refused(&master, "is a script, which can't be held, and another file is there now");
        fs::remove_file(&script).unwrap();
        refused(&master, "is a script, which can't be held, and another file is there now");
        master.stop();
    });
}

#[test]
fn a_program_overwritten_in_place_does_not_come_back() {
    world(&[], |world| {
        let program = Program::new(world);
        let app = program.app(world, "");
        let master = Master::start(world, &app);
        App::test_worker(world, "").write();
        master.upgrade();
        // The same bytes, so that only the time tells: nobody executes it any more, or this would be refused.
        let bytes = fs::read(&program.path).unwrap();
        fs::File::options().write(true).open(&program.path).unwrap().write_all(&bytes).unwrap();
        refused(&master, "was overwritten in place");
        master.stop();
    });
}

/// The old workers have begun to leave: the rollback waits for that, and then goes to the generation before.
fn while_retiring(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let program = Program::new(world);
        let app = program.app(world, &format!("--mode {mode} --inline")).engine(engine).workers(1);
        let master = Master::start(world, &app);
        let first = program.file();
        let held = Held::open(world, &master);
        program.become_another_by_rename();
        let upgrade = master.begin("upgrade --wait --json");
        let load = {
            master.wait_status("retiring", |status| status.state == MasterState::Retiring);
            Load::start(spec(world).rate(100.0).burst(20, Duration::from_millis(300)))
        };
        let rollback = master.begin("rollback --wait=drained --json");
        let status = master.wait_status("waiting", |status| status.upgrade_waits);
        assert_eq!((status.state, status.active_generation), (MasterState::Retiring, Some(2)));
        load.answered_by(2);
        held.release(1);
        let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
        assert_eq!((code, receipt.outcome, receipt.to), (0, Outcome::Completed, Some(2)), "{receipt:#?}");
        let (code, receipt) = master.receipt(rollback.finish(PATIENCE));
        assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}\n{}", master.log());
        assert_eq!((receipt.trigger, receipt.from, receipt.to), (Trigger::Rollback, Some(2), Some(3)));
        assert_eq!(running(&master), [first].into(), "{}", master.log());
        load.answered_by(3);
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn while_retiring_unmodified_ebpf() {
    while_retiring("ebpf", "plain");
}

#[test]
fn while_retiring_sdk_cbpf() {
    while_retiring("cbpf", "sdk");
}

/// The master is killed while the old program starts: the next one goes on with it.
#[test]
fn a_rollback_outlives_the_master() {
    world(&[], |world| {
        let program = Program::new(world);
        let app = program.app(world, "--ready-delay 1000");
        let mut master = Master::start(world, &app);
        let first = program.file();
        program.become_another_by_rename();
        master.upgrade();
        fs::remove_file(&program.path).unwrap();
        let client = master.begin("rollback --wait");
        master.wait_status("kept", |_| state_of(master.app()).contains("\"trigger\":\"Rollback\""));
        master.kill();
        let done = client.finish(PATIENCE);
        assert!(done.code == 1 && done.stderr.contains("the master ended"), "{done:#?}");
        master.restart();
        master.wait_adopted();
        let is_back = |status: &Status| {
            status.state == MasterState::Steady
                && status.active_generation > Some(2)
                && status.generations.len() == 1
        };
        master.wait_status("back", is_back);
        assert_eq!(running(&master), [first].into(), "{}", master.log());
        let last = master.status().last_upgrade.expect("of the rollback");
        assert_eq!((last.trigger, last.outcome), (Trigger::Rollback, Outcome::Completed), "{last:#?}");
        master.stop();
    });
}
