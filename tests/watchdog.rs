//! Workers that must give signs of life: those that do live, those that don't are killed and replaced.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use reuseportd_wire::status::{MasterState, Outcome, Status};
use rustix::process::Signal;

use crate::crash::{one_at_a_time, queues_of_twenty};
use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::load::{Load, slow_accepts, spec};
use crate::support::master::Master;
use crate::support::process::{signal, wait_gone};
use crate::support::world::{Need, World, example, needs_of, world};

/// What is written as "3s" below: half of it is enough for a sign of life to be late by on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(3);

pub(crate) fn restarts(status: &Status) -> u32 {
    status.generations.iter().flat_map(|one| &one.workers).map(|worker| worker.restarts).sum()
}

/// Asks for the status until two timeouts have passed in which nothing happened to these workers.
fn assert_lives(master: &Master, pids: &[u32]) {
    let begun = Instant::now();
    let status = master.wait_status("two timeouts old", |_| begun.elapsed() > 2 * TIMEOUT);
    assert_eq!((restarts(&status), master.serving()), (0, pids.to_vec()), "{}", master.log());
}

/// Waits until one of these workers has been replaced, and demands that nothing happened to the others.
fn assert_replaced(master: &Master, before: &[u32], stuck: u32) {
    let replaced = |status: &Status| restarts(status) == 1 && status.state == MasterState::Steady;
    master.wait_status("replaced", |status| replaced(status) && master.serving().len() == before.len());
    wait_gone(stuck, PATIENCE);
    let after = master.serving();
    for pid in before {
        assert_eq!(after.contains(pid), *pid != stuck, "{before:?} {after:?}");
    }
    let told = format!("pid {stuck}) gave no sign of life (watchdog.timeout)");
    let log = master.log();
    let told: Vec<&str> = log.lines().filter(|line| line.contains(&told)).collect();
    assert!(told.len() == 1 && told[0].contains("event=\"replaced\""), "{log}");
}

fn stuck_under_load(engine: &'static str, mode: &str, stop: Signal) {
    world(needs_of(engine), |world| {
        let app = one_at_a_time(world, mode, engine).watchdog("3s");
        let master = Master::start(world, &app);
        let load = Load::start(queues_of_twenty(world));
        let before = master.serving();
        // SIGUSR1: its accept loop gets stuck with the next connection.
        signal(before[1], stop);
        assert_replaced(&master, &before, before[1]);
        load.answered(600);
        let report = load.end();
        assert!(report.lost() <= 1, "it had one connection in its hands: {report}\n{}", master.log());
        assert_eq!(restarts(&master.status()), 1);
        master.stop();
    });
}

#[test]
fn a_stuck_worker_is_replaced_sdk_ebpf() {
    stuck_under_load("ebpf", "sdk", Signal::USR1);
}

#[test]
fn a_stuck_worker_is_replaced_sdk_cbpf() {
    stuck_under_load("cbpf", "sdk", Signal::USR1);
}

#[test]
fn a_stuck_worker_is_replaced_unmodified_ebpf() {
    stuck_under_load("ebpf", "plain", Signal::USR1);
}

#[test]
fn a_stopped_process_is_replaced() {
    stuck_under_load("ebpf", "sdk", Signal::STOP);
}

#[test]
fn without_a_watchdog_a_stuck_worker_stays() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode sdk").workers(2);
        let master = Master::start(world, &app);
        let before = master.serving();
        signal(before[0], Signal::STOP);
        assert_lives(&master, &before);
        signal(before[0], Signal::CONT);
        master.stop();
    });
}

#[test]
fn who_gives_signs_of_life_lives() {
    world(&[], |world| {
        let programs = [
            test_worker("--mode sdk"),
            test_worker("--mode plain --threads 2"),
            vec![example("http_tokio").to_str().unwrap().to_owned()],
        ];
        for command in programs {
            let app = App::new(world, command).workers(2).watchdog("3s");
            let master = Master::start(world, &app);
            // Idle first, then with more to do than time to say so after each connection.
            assert_lives(&master, &master.serving());
            let before = master.serving();
            let load = Load::start(spec(world).rate(500.0));
            load.answered(1000);
            load.end_lossless();
            assert_eq!((master.serving(), restarts(&master.status())), (before, 0));
            master.upgrade();
            master.stop();
        }
    });
}

#[test]
fn a_worker_that_waits_for_the_others_gives_signs_of_life() {
    world(&[], |world| {
        // Seat 0 is ready at once, seat 5 long after its timeout, and nobody serves before.
        let app = App::test_worker(world, "--mode sdk --ready-delay {seat}000").watchdog("3s");
        let app = app.workers(6);
        let master = Master::start(world, &app);
        assert_eq!((master.upgrade().outcome, restarts(&master.status())), (Outcome::Completed, 0));
        master.stop();
    });
}

#[test]
fn an_upgrade_to_workers_that_get_stuck_fails() {
    world(&[], |world| {
        let mut app = App::test_worker(world, "--mode plain --accept-delay 5").watchdog("3s");
        let master = Master::start(world, &app);
        let load = Load::start(slow_accepts(world));
        let before = master.serving();
        // Seat 0 is ready at once and silent from then on; the last would be ready long after its timeout.
        app.command = test_worker("--mode plain --fail stuck --ready-delay {seat}000");
        app.workers = 6;
        app.write();
        let (code, receipt) = master.failing_upgrade();
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        let reason = receipt.reason.unwrap_or_default();
        assert!(reason.contains("seat 0") && reason.contains("(watchdog.timeout)"), "{reason}");
        load.answered(200);
        assert_eq!((master.serving(), restarts(&master.status())), (before, 0));
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn a_worker_that_was_told_to_stop_owes_no_signs_of_life() {
    world(&[], |world| {
        for mode in ["sdk", "plain"] {
            let app = App::test_worker(world, &format!("--mode {mode}"))
                .watchdog("3s")
                .upgrade("idle_timeout = \"100ms\"");
            let master = Master::start(world, &app.workers(1));
            let mut held = TcpStream::connect(world.address).unwrap();
            held.set_read_timeout(Some(PATIENCE)).unwrap();
            held.write_all(b"half").unwrap();
            master.wait_status("accepted", |status| status.generations[0].connections == Some(1));
            assert_eq!(master.cli("upgrade --wait").code, 0);
            assert_lives(&master, &master.serving());
            held.write_all(b" a line\n").unwrap();
            let mut answer = String::new();
            held.read_to_string(&mut answer).unwrap();
            assert!(answer.contains("generation=1"), "{mode}: {answer}");
            master.stop();
        }
    });
}

#[test]
fn signs_of_life_that_a_busy_master_has_not_read_count() {
    world(&[], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode sdk").watchdog("3s"));
        let before = master.serving();
        let load = Load::start(spec(world).rate(200.0));
        signal(master.pid(), Signal::STOP);
        load.answered(900); // one and a half timeouts' worth
        signal(master.pid(), Signal::CONT);
        assert_lives(&master, &before);
        load.end_lossless();
        master.stop();
    });
}

/// Any program that knows systemd's protocol. What clients send is done: `silence`, `trigger`, `environment`.
const SYSTEMD_STYLE: &str = "
import os, select, socket, sys
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
say = lambda text: notify.sendto(text, os.environ['NOTIFY_SOCKET'])
listener = socket.create_server(('127.0.0.1', int(sys.argv[1])), reuse_port=True)
say(b'READY=1')
usec = os.environ.get('WATCHDOG_USEC')
interval = int(usec) / 2e6 if usec and int(os.environ['WATCHDOG_PID']) == os.getpid() else None
while True:
    if interval:
        say(b'WATCHDOG=1')
    if select.select([listener], [], [], interval)[0]:
        connection = listener.accept()[0]
        wish = connection.recv(100)
        connection.sendall(' '.join(map(str, [usec, os.environ.get('WATCHDOG_PID'), os.getpid()])).encode())
        connection.close()
        if wish == b'trigger':
            say(b'WATCHDOG=trigger')
        if wish != b'environment':
            interval = None
";

/// One such worker, with this timeout.
fn systemd_style(world: &World) -> App {
    App::new(world, ["python3", "-c", SYSTEMD_STYLE, "{port.default}"]).workers(1)
}

fn ask(world: &World, wish: &[u8]) -> Vec<String> {
    let mut stream = TcpStream::connect(world.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(wish).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split(' ').map(str::to_owned).collect()
}

#[test]
fn a_program_that_knows_systemds_protocol_is_watched() {
    world(&[Need::Python], |world| {
        let master = Master::start(world, &systemd_style(world).watchdog("3s"));
        let before = master.serving();
        let pid = before[0].to_string();
        assert_eq!(ask(world, b"environment"), ["3000000", &pid, &pid]);
        assert_lives(&master, &before);
        ask(world, b"silence");
        assert_replaced(&master, &before, before[0]);
        master.stop();
    });
}

#[test]
fn a_worker_may_say_itself_that_it_is_stuck() {
    world(&[Need::Python], |world| {
        let master = Master::start(world, &systemd_style(world).watchdog("1h"));
        let before = master.serving();
        ask(world, b"trigger");
        assert_replaced(&master, &before, before[0]);
        master.stop();
    });
}

#[test]
fn the_masters_own_watchdog_is_not_its_workers() {
    world(&[Need::Python], |world| {
        // As systemd sets it, which knows the pid of what it starts.
        let mut command = std::process::Command::new("sh");
        let sets = "export WATCHDOG_USEC=60000000 WATCHDOG_PID=$$; exec \"$0\" \"$@\"";
        command.args(["-c", sets, crate::support::master::REUSEPORTD]);
        let mut master = Master::launch(world, &systemd_style(world), command);
        master.wait_ready();
        assert_eq!(ask(world, b"environment")[..2], ["None", "None"]);
        master.stop();
    });
}
