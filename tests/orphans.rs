//! Master and keeper are killed: the workers serve on, and the next master replaces them without a loss. And what it
//! finds that is not its own, it leaves alone.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reuseportd_sys::{memfd, procfs};
use reuseportd_wire::status::{MasterState, Outcome, Receipt, Trigger};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::adoption::{busy, control_loses, end_lossless, many, nothing_is_left};
use crate::keeper::program::fetch;
use crate::support::app::App;
use crate::support::load::{Load, spec};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{keepers_of, kill, processes_of, wait_gone};
use crate::support::world::{Need, World, needs_of, repository, world};
use crate::support::{PATIENCE, rounds};

/// Nobody's user here, and not root.
const UID: u32 = 61_236;

/// Both at once, so that neither can replace the other.
pub(crate) fn kill_with_keeper(world: &World, master: &mut Master) {
    master.signal(Signal::STOP);
    let keepers = keepers_of(&world.app);
    assert_eq!(keepers.len(), 1);
    kill(keepers);
    master.kill();
}

/// Starts the next master and waits until it has upgraded away from these workers.
pub(crate) fn replaced(master: &mut Master, orphans: &[u32]) -> Receipt {
    let mark = master.upstream.mark();
    master.restart();
    assert!(master.upstream.wait(mark, "READY=1", PATIENCE).is_some(), "never ready:\n{}", master.log());
    let status = master
        .wait_status("steady", |status| status.state == MasterState::Steady && status.generations.len() == 1);
    assert!(status.master.adopted, "{status:#?}");
    let receipt = status.last_upgrade.expect("every upgrade leaves a receipt");
    assert_eq!((receipt.outcome, receipt.trigger), (Outcome::Completed, Trigger::Orphans), "{receipt:#?}");
    assert_eq!(status.active_generation, receipt.from.map(|from| from + 1));
    for pid in orphans {
        wait_gone(*pid, PATIENCE);
    }
    receipt
}

fn killed_with_the_keeper(mode: &str, engine: &'static str) {
    world(needs_of(engine), |world| {
        let mut master = Master::start(world, &busy(world, mode, engine));
        let load = Load::start(many(world));
        for round in 0..rounds(2, 5) {
            // Some that drain may be among them.
            let orphans: Vec<u32> = processes_of(&world.app).iter().map(|process| process.pid).collect();
            let serving = master.serving();
            kill_with_keeper(world, &mut master);
            load.answered(300);
            let left = processes_of(&world.app);
            let lives = |pid: &u32| left.iter().any(|process| process.pid == *pid);
            assert!(serving.iter().all(lives), "a worker went with its master: {serving:?} {left:?}");
            let receipt = replaced(&mut master, &orphans);
            assert_eq!(receipt.to, Some(2 * round + 2));
            load.answered_by(2 * round + 2);
            // It is a master like any other now.
            master.hup();
            load.answered_by(2 * round + 3);
        }
        end_lossless(load, mode, &master);
        master.stop();
        control_loses(world, many(world));
    });
}

#[test]
fn killed_with_the_keeper_sdk_ebpf() {
    killed_with_the_keeper("sdk", "ebpf");
}

#[test]
fn killed_with_the_keeper_unmodified_cbpf() {
    killed_with_the_keeper("plain", "cbpf");
}

#[test]
fn killed_with_the_keeper_the_other_kinds() {
    if rounds(0, 1) == 1 {
        for (mode, engine) in
            [("sdk", "cbpf"), ("plain", "ebpf"), ("activated", "ebpf"), ("activated", "cbpf")]
        {
            killed_with_the_keeper(mode, engine);
        }
    }
}

/// A Python server that prints a line for each connection.
fn printer(world: &World, engine: &'static str) -> App {
    let program = repository("examples/echo.py");
    let port = world.address.port().to_string();
    App::new(world, ["python3", program.to_str().unwrap(), &port])
        .readiness("listen")
        .engine(engine)
        .workers(1)
}

/// Lines about connections that came out of the masters.
fn lines_about_connections(world: &World) -> u64 {
    world.read("master.out").lines().filter(|line| line.contains(" serves ")).count() as u64
}

/// What a worker prints with nobody there to read it, is read by the next master; and printing does not end it.
fn what_is_printed_is_not_lost(engine: &'static str, with_keeper: bool) {
    world(&[needs_of(engine), &[Need::Python]].concat(), |world| {
        let mut master = Master::start(world, &printer(world, engine));
        let workers = master.serving();
        match with_keeper {
            true => kill_with_keeper(world, &mut master),
            false => master.kill(),
        }
        // More than a pipe holds by default.
        let before = lines_about_connections(world);
        let load = Load::start(spec(world).echo().rate(600.0).burst(60, Duration::from_millis(300)));
        load.answered(2500);
        assert_eq!(processes_of(&world.app).len(), 1, "printing has ended it");
        assert_eq!(lines_about_connections(world), before, "who has read that?");
        if with_keeper {
            replaced(&mut master, &workers);
        } else {
            master.restart();
            master.wait_adopted();
            assert_eq!(master.serving(), workers);
            master.hup();
        }
        load.answered(200);
        let report = load.end_lossless();
        master.stop();
        // With `ebpf` each of the two generations' workers has accepted a connection that proved it.
        let proofs = if engine == "ebpf" { 2 } else { 0 };
        assert_eq!(lines_about_connections(world), report.issued + proofs, "{report}");
    });
}

#[test]
fn what_is_printed_is_not_lost_ebpf() {
    what_is_printed_is_not_lost("ebpf", false);
}

#[test]
fn what_orphans_print_is_not_lost_cbpf() {
    what_is_printed_is_not_lost("cbpf", true);
}

#[test]
fn what_is_printed_is_not_lost_the_other_way_round() {
    if rounds(0, 1) == 1 {
        what_is_printed_is_not_lost("cbpf", false);
        what_is_printed_is_not_lost("ebpf", true);
    }
}

fn journal_of(world: &World) -> PathBuf {
    world.path("run/control.sock.journal")
}

#[test]
fn orphans_are_found_without_a_journal() {
    world(&[Need::Bpf], |world| {
        let torn = |path: &Path| {
            let text = fs::read(path).unwrap();
            fs::write(path, &text[..text.len() / 2]).unwrap();
        };
        let removed = |path: &Path| fs::remove_file(path).unwrap();
        let ways: [(fn(&Path), _); 2] = [(torn, "it is cut off or damaged"), (removed, "")];
        for (change, said) in ways {
            let mut master = Master::start(world, &App::test_worker(world, "--mode plain"));
            let orphans = master.serving();
            kill_with_keeper(world, &mut master);
            change(&journal_of(world));
            replaced(&mut master, &orphans);
            assert!(master.log().contains(said), "{}", master.log());
            master.stop();
        }
    });
}

/// A process that has nothing to do with us; ends with the test.
struct Bystander(Child);

impl Bystander {
    fn start() -> Bystander {
        Bystander(Command::new("sleep").arg("1000").process_group(0).spawn().unwrap())
    }

    /// As a worker in a journal.
    fn entry(&self) -> Value {
        let pid = self.0.id().cast_signed();
        let process = procfs::process(pid).unwrap();
        json!({"pid": pid, "start_time": process.start_time, "generation": 1, "seat": 0})
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A journal that says all is well with this worker.
fn journal_with(entry: Value) -> Value {
    use reuseportd_sys::namespace::{boot_id, network, processes};
    let (boot, network, processes) = (boot_id().unwrap(), network().unwrap(), processes().unwrap());
    let place = json!({"boot": boot, "network": network, "processes": processes});
    json!({"journal": 1, "by": "0.1.0", "place": place, "workers": [entry]})
}

/// A start with this journal in place: what became of its only worker, and the log. The master must start.
fn start_with(world: &World, plant: impl FnOnce(&Path, Value)) -> (bool, String) {
    let mut bystander = Bystander::start();
    fs::create_dir_all(world.path("run")).unwrap();
    plant(&journal_of(world), journal_with(bystander.entry()));
    let mut master = Master::start(world, &App::test_worker(world, "--mode sdk").workers(1));
    master
        .wait_status("steady", |status| status.state == MasterState::Steady && status.generations.len() == 1);
    let log = master.log();
    master.signal(Signal::TERM);
    assert_eq!(master.wait_end(PATIENCE), Some(0));
    nothing_is_left(world);
    (bystander.lives(), log)
}

#[test]
fn what_a_journal_says_of_others_is_not_believed() {
    world(&[Need::Root], |world| {
        let write = |path: &Path, journal: &Value| fs::write(path, journal.to_string()).unwrap();
        // A process that is what the journal says is taken for a worker, and replaced: so this can be seen.
        assert!(
            !start_with(world, |path, journal| write(path, &journal)).0,
            "this journal could be believed"
        );

        type Change = (&'static str, Value, &'static str);
        let changes: [Change; 6] = [
            ("/place/boot", json!("another"), "it is of a master that ran before the last boot"),
            ("/place/processes", json!(1), "it is of a master that ran in another pid namespace"),
            // The pid is another's by now.
            ("/workers/0/start_time", json!(7), ""),
            ("/workers/0/pid", json!(0), ""),
            ("/workers/0/pid", json!(-1), ""),
            ("/workers/0/seat", json!(-1), "it is damaged"),
        ];
        for (place, value, said) in changes {
            let (lives, log) = start_with(world, |path, mut journal| {
                *journal.pointer_mut(place).unwrap() = value;
                write(path, &journal);
            });
            assert!(lives && log.contains(said), "{place}: {log}");
        }
        let (lives, log) = start_with(world, |path, journal| {
            write(path, &journal);
            chown(path, Some(UID), None).unwrap();
        });
        assert!(lives && log.contains("it is no plain file of this user"), "{log}");

        let target = world.path("target");
        let (lives, log) = start_with(world, |path, journal| {
            write(&target, &journal);
            symlink(&target, path).unwrap();
        });
        assert!(lives && log.contains("journal_unused"), "{log}");
        assert!(world.read("target").contains("\"seat\":0"), "the link was followed");
    });
}

/// The next master refuses to start, with exit code 1 and these words; nothing has changed.
fn refused(world: &World, master: &mut Master, command: Command, said: &[&str]) {
    let before = (processes_of(&world.app), keepers_of(&world.app));
    let files = || {
        let names = fs::read_dir(world.path("run")).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name != "control.sock" && name != "control.sock.notify").collect::<Vec<_>>()
    };
    let there = files();
    master.restart_by(command);
    assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
    assert_eq!((processes_of(&world.app), keepers_of(&world.app)), before);
    assert_eq!(files(), there);
    let log = master.log();
    assert!(said.iter().all(|said| log.contains(said)), "{said:?} {log}");
}

#[test]
fn a_newer_journal_is_refused_and_a_newer_state_passed_over() {
    world(&[Need::Bpf], |world| {
        let mut master = Master::start(world, &App::test_worker(world, "--mode plain"));
        let orphans = master.serving();
        kill_with_keeper(world, &mut master);
        let text = fs::read_to_string(journal_of(world)).unwrap();
        let mut journal: Value = serde_json::from_str(&text).unwrap();
        journal["journal"] = json!(2);
        journal["by"] = json!("9.9.9");
        fs::write(journal_of(world), journal.to_string()).unwrap();
        for _ in 0..2 {
            let said = [
                "was written by version 9.9.9, whose form 2",
                "its workers serve on",
                "`stop --left-behind`",
            ];
            refused(world, &mut master, Command::new(REUSEPORTD), &said);
        }
        let done = master.cli("stop --left-behind");
        assert_eq!(done.code, 1, "{done:#?}");
        assert!(done.stderr.contains("9.9.9"), "{done:#?}");
        fs::write(journal_of(world), text).unwrap();
        replaced(&mut master, &orphans);

        // A state that only a newer one understands: its workers are orphans.
        let orphans = master.serving();
        master.kill();
        let inherited = fetch(&world.path("run/control.sock.keeper")).unwrap().expect("a keeper");
        let state = String::from_utf8(inherited.state).unwrap();
        assert!(state.contains("\"snapshot\":1"), "{state}");
        let state = state.replacen("\"snapshot\":1", "\"snapshot\":2", 1);
        let mut keeper = inherited.keeper;
        keeper.save(std::os::fd::AsFd::as_fd(&memfd::sealed("state", state.as_bytes()).unwrap())).unwrap();
        drop((keeper, inherited.fds));
        replaced(&mut master, &orphans);
        assert!(master.log().contains("whose form 2 this version"), "{}", master.log());
        master.stop();
    });
}

#[test]
fn workers_in_other_namespaces_are_left_alone() {
    world(&[Need::Root, Need::Bpf], |world| {
        let in_network = || {
            let mut command = Command::new("unshare");
            command.args(["--net", REUSEPORTD]);
            command
        };
        let in_pids = || {
            let mut command = Command::new("unshare");
            let script = "\"$@\"; exit $?";
            command.args(["--pid", "--fork", "--mount-proc", "sh", "-c", script, "-", REUSEPORTD]);
            command
        };
        let mut master = Master::start(world, &App::test_worker(world, "--mode sdk"));
        let workers = master.serving();
        master.kill();
        let remedy = "`reuseportd stop --left-behind`";
        refused(
            world,
            &mut master,
            in_network(),
            &["ran in another network namespace; start it there", remedy],
        );
        refused(world, &mut master, in_pids(), &["in another pid namespace", remedy]);
        master.restart();
        master.wait_adopted();
        assert_eq!(master.serving(), workers);

        kill_with_keeper(world, &mut master);
        let lines = master.log().lines().count();
        refused(world, &mut master, in_network(), &[]);
        let log: Vec<String> = master.log().lines().skip(lines).map(str::to_owned).collect();
        assert!(
            log.iter().any(|line| line.contains("ran in another network namespace; start it there")),
            "{log:?}"
        );
        replaced(&mut master, &workers);
        master.stop();
    });
}

#[test]
fn the_same_path_in_a_container_is_another_ones() {
    world(&[Need::Root], |world| {
        // A process as a container's workers are for the host: same variables, other namespaces.
        let like_a_worker = |namespace: &str| {
            let mut command = Command::new("unshare");
            let socket = format!("NOTIFY_SOCKET={}", world.path("run/control.sock.notify").display());
            let variables = [&socket, "REUSEPORTD_GENERATION=1", "REUSEPORTD_SEAT=0"];
            command.args([namespace, "--fork", "setsid", "env"]).args(variables).args(["sleep", "1000"]);
            Bystander(command.process_group(0).stderr(Stdio::null()).spawn().unwrap())
        };
        let mut others = ["--net", "--pid"].map(like_a_worker);
        let children = |of: &Bystander| {
            let path = format!("/proc/{0}/task/{0}/children", of.0.id());
            fs::read_to_string(path).unwrap_or_default().trim().parse::<u32>().ok()
        };
        let deadline = Instant::now() + PATIENCE;
        let is_up =
            |pid: u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|is| is.starts_with(b"sleep\0"));
        while !others.iter().all(|other| children(other).is_some_and(is_up)) {
            assert!(Instant::now() < deadline, "they do not start");
        }
        let inner: Vec<u32> = others.iter().filter_map(children).collect();
        let mut master = Master::start(world, &App::test_worker(world, "--mode sdk").workers(1));
        master.kill();
        let done = master.cli("stop --left-behind");
        assert_eq!((done.code, done.stdout.as_str()), (0, "1 workers were left behind\n"), "{done:#?}");
        assert!(inner.iter().all(|pid| Path::new(&format!("/proc/{pid}")).exists()));
        assert!(others.iter_mut().all(Bystander::lives));
        kill(inner);
    });
}

#[test]
fn files_of_others_in_a_common_directory_are_left_alone() {
    world(&[Need::Root], |world| {
        let run = world.path("run");
        fs::create_dir(&run).unwrap();
        fs::set_permissions(&run, fs::Permissions::from_mode(0o1777)).unwrap();
        let mut bystander = Bystander::start();
        let planted = [
            journal_of(world),
            world.path("run/control.sock.keeper"),
            world.path("run/control.sock.journal.new"),
        ];
        fs::write(&planted[0], journal_with(bystander.entry()).to_string()).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&planted[1]).unwrap();
        fs::write(&planted[2], "of another user").unwrap();
        for path in &planted {
            chown(path, Some(UID + 1), Some(UID + 1)).unwrap();
        }
        let before = fs::read(&planted[0]).unwrap();
        let program = world.path("reuseportd");
        fs::copy(REUSEPORTD, &program).unwrap();
        let worker = world.path("worker");
        fs::copy(crate::support::world::example("test_worker"), &worker).unwrap();
        chown(world.path(""), Some(UID), Some(UID)).unwrap();
        let app = App::new(world, [worker.to_str().unwrap(), "--mode", "sdk"]);
        let mut master = Master::start_as(world, &app, program, UID);
        // It can neither write a journal nor have a keeper, says so, and serves.
        let log = master.log();
        for said in [
            "event=\"journal_unused\"",
            "event=\"not_saved\"",
            "event=\"no_keeper\"",
            "is not used: it belongs to user",
        ] {
            assert!(log.contains(said), "{said}: {log}");
        }
        master.upgrade();
        master.signal(Signal::TERM);
        assert_eq!(master.wait_end(PATIENCE), Some(0), "{}", master.log());
        assert!(bystander.lives());
        assert_eq!(fs::read(&planted[0]).unwrap(), before);
        assert!(planted.iter().all(|path| path.exists()), "something of another user's was removed");
        assert_eq!((processes_of(&world.app), keepers_of(&world.app)), (vec![], vec![]));
    });
}

#[test]
fn a_start_that_fails_leaves_what_it_found_to_the_next() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode sdk");
        let mut master = Master::start(world, &app);
        let orphans = master.serving();
        kill_with_keeper(world, &mut master);
        app.write_invalid();
        master.restart();
        assert_eq!(master.wait_end(PATIENCE), Some(2), "{}", master.log());
        assert!(journal_of(world).exists());
        assert_eq!(processes_of(&world.app).len(), orphans.len());
        app.write();
        replaced(&mut master, &orphans);
        master.stop();
    });
}

/// As on a full disk: the keeper gets the state all the same, and nobody tries without a pause.
#[test]
fn a_journal_that_cannot_be_written_keeps_nobody_from_adopting() {
    world(&[], |world| {
        let mut master = Master::start(world, &App::test_worker(world, "--mode sdk"));
        let in_the_way = world.path("run/control.sock.journal.new");
        std::fs::create_dir_all(in_the_way.join("not empty")).unwrap();
        master.upgrade();
        let workers = master.serving();
        master.kill();
        let complaints = master.log().matches("not_saved").count();
        assert_eq!(complaints, 1, "{}", master.log());
        master.restart();
        master.wait_adopted();
        assert_eq!((master.serving(), master.status().active_generation), (workers, Some(2)));
        std::fs::remove_dir_all(&in_the_way).unwrap();
        master.stop();
    });
}
