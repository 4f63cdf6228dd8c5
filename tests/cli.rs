//! Exit codes and output of the subcommands.

mod live;

use std::os::unix::process::CommandExt;
use std::process::Command;

use reuseportd_wire::status::{Engine, GenerationState, MasterState, Outcome, Trigger, WorkerState};
use rustix::process::Signal;

use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::Running;
use crate::support::world::{Need, world};

#[test]
fn status_tells_what_runs() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain").engine("cbpf").workers(2);
        let master = Master::start(world, &app);
        let status = master.status();
        assert_eq!(status.app, world.app);
        assert_eq!((status.state, status.active_generation), (MasterState::Steady, Some(1)));
        assert_eq!(status.master.pid, master.pid());
        assert_eq!(status.master.version, env!("CARGO_PKG_VERSION"));
        assert!(!status.master.adopted && status.master.reexecs == 0);
        let [generation] = &status.generations[..] else { panic!("{status:#?}") };
        assert_eq!((generation.state, generation.share), (GenerationState::Active, 1.0));
        assert_eq!(generation.executable.path, test_worker("")[0]);
        assert_eq!(generation.executable.sha256.as_ref().map(String::len), Some(64));
        assert!(generation.executable.pinned && generation.executable.inode > 0);
        assert_eq!(generation.connections, Some(0));
        for (seat, worker) in generation.workers.iter().enumerate() {
            assert_eq!(
                (worker.seat as usize, worker.state, worker.restarts),
                (seat, WorkerState::Serving, 0)
            );
            assert_eq!(worker.listeners.len(), 1);
            assert_eq!(
                (worker.listeners[0].accept_queue, worker.listeners[0].backlog),
                (Some(0), Some(4096))
            );
        }
        let [listener] = &status.listeners[..] else { panic!("{status:#?}") };
        assert_eq!((listener.engine, listener.strangers), (Engine::Cbpf, Some(0)));
        assert_eq!(listener.address, world.address.to_string());
        assert!(!listener.engine_reason.is_empty());
        let table = master.cli("status");
        assert_eq!(table.code, 0);
        let pid = generation.workers[0].pid.unwrap().to_string();
        for word in [&world.app, "steady", "cbpf", "serving", &pid, &listener.address] {
            assert!(table.stdout.contains(word), "{word:?} is not in\n{}", table.stdout);
        }
        master.stop();
    });
}

#[test]
fn the_receipt_has_every_field() {
    world(&[], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode sdk"));
        let receipt = master.upgrade();
        assert_eq!((receipt.from, receipt.to), (Some(1), Some(2)));
        assert_eq!((receipt.trigger, receipt.outcome), (Trigger::Command, Outcome::Completed));
        assert_eq!((receipt.reason, receipt.forced_kills, receipt.connections_cut), (None, 0, Some(0)));
        let sum: u64 = receipt.phases.iter().map(|phase| phase.ms).sum();
        assert!(receipt.phases.len() >= 3 && sum <= receipt.duration_ms + 2000, "{:?}", receipt.phases);
        let [listener] = &receipt.listeners[..] else { panic!("{:#?}", receipt.listeners) };
        assert_eq!(listener.queued_at_switch, Some(0));
        assert_eq!(listener.half_open_at_switch, Some(0));
        assert_eq!((listener.leftovers_lost, listener.half_open_abandoned), (Some(0), Some(0)));
        let shown = master.status().last_upgrade.expect("there was one");
        assert_eq!((shown.to, shown.outcome), (Some(2), Outcome::Completed));
        let told = master.cli("upgrade --wait");
        assert_eq!(told.code, 0, "{told:#?}");
        assert!(told.stdout.contains('3') && told.stdout.contains("completed"), "{told:#?}");
        master.hup();
        let shown = master.status().last_upgrade.expect("there was one");
        assert_eq!((shown.to, shown.trigger), (Some(4), Trigger::Signal));
        master.stop();
    });
}

#[test]
fn without_a_master_the_code_is_3() {
    world(&[], |world| {
        App::test_worker(world, "").write();
        for words in [
            "status",
            "status --json",
            "status --receipts",
            "upgrade",
            "upgrade --wait",
            "rollback",
            "rollback --wait=drained --json",
            "scale 2",
            "scale 2 --wait",
            "restart-worker 0",
            "restart-worker 0 --wait",
            "stop",
            "stop --wait",
        ] {
            let mut command = Command::new(REUSEPORTD);
            command.args(words.split(' ')).arg("--config").arg(world.path("app.toml"));
            let done = Running::start(command).finish(PATIENCE);
            assert_eq!(done.code, 3, "{words}: {done:#?}");
            assert!(done.stderr.contains("control.sock"), "{words}: {done:#?}");
        }
    });
}

#[test]
fn a_timeout_that_passes_is_4_and_the_upgrade_goes_on() {
    world(&[], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(1);
        let master = Master::start(world, &app);
        app.command = test_worker("--mode plain --ready-delay 3000");
        app.write();
        let done = master.cli("upgrade --wait --timeout 100ms");
        assert_eq!(done.code, 4, "{done:#?}");
        master.wait_status("upgraded", |status| {
            (status.active_generation, status.state) == (Some(2), MasterState::Steady)
        });
        master.stop();
    });
}

#[test]
fn upgrade_without_wait_returns_at_once() {
    world(&[], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode plain").workers(1));
        assert_eq!(master.cli("upgrade").code, 0);
        master.wait_status("upgraded", |status| status.active_generation == Some(2));
        master.stop();
    });
}

#[test]
fn stop_answers_when_asked_to_wait() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode sdk");
        for words in ["stop --wait", "stop"] {
            let master = Master::start(world, &app);
            let done = master.cli(words);
            assert_eq!(done.code, 0, "{done:#?}");
            master.ended(0);
        }
    });
}

#[test]
fn wrong_usage_and_invalid_configs_are_2() {
    world(&[], |world| {
        std::fs::write(world.path("bad.toml"), "[app]\ncomand = [\"x\"]\n").unwrap();
        let bad = world.path("bad.toml");
        let bad = bad.to_str().unwrap();
        for words in
            ["frobnicate", &format!("--config {bad}"), "", "scale 0 --socket /s", "scale --socket /s"]
        {
            let mut command = Command::new(REUSEPORTD);
            command.args(words.split_whitespace());
            let done = Running::start(command).finish(PATIENCE);
            assert_eq!(done.code, 2, "{words:?}: {done:#?}");
        }
    });
}

#[test]
fn other_users_may_not_speak_to_the_master() {
    world(&[Need::Root], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(1);
        let program = world.path("reuseportd");
        std::fs::copy(REUSEPORTD, &program).unwrap();
        let ask = |uid| {
            let mut command = Command::new(&program);
            command.args(["status", "--socket"]).arg(world.path("run/control.sock")).uid(uid).gid(uid);
            Running::start(command).finish(PATIENCE)
        };
        let master = Master::start(world, &app);
        let refused = ask(1234);
        assert_eq!(refused.code, 1, "{refused:#?}");
        assert!(
            refused.stderr.to_lowercase().contains("permission") || refused.stderr.contains("allow"),
            "{refused:#?}"
        );
        master.stop();

        // Reachable for all, so that the credentials decide.
        app.control = vec!["mode = \"0666\"".into(), "allow_users = [1234]".into()];
        let master = Master::start(world, &app);
        assert_eq!(ask(1234).code, 0, "{:#?}", ask(1234));
        let refused = ask(1235);
        assert_eq!(refused.code, 1, "{refused:#?}");
        assert!(refused.stderr.contains("allow"), "{refused:#?}");
        master.stop();
    });
}

#[test]
fn a_broken_client_does_no_harm() {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    world(&[], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode plain").workers(1));
        let connect = || {
            let stream = UnixStream::connect(world.path("run/control.sock")).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        };
        let nonsense: [&[u8]; 4] = [b"\n", b"{}\n", b"\xff\xfe\n", b"{\"command\":\"explode\"}\n"];
        for bytes in nonsense {
            let mut stream = connect();
            stream.write_all(bytes).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.contains("\"error\""), "{answer:?}");
        }
        let mut flood = connect();
        let sent = flood.write_all(&vec![b'x'; 1 << 20]);
        let end = flood.read_to_end(&mut Vec::new());
        assert!(sent.is_err() || end.is_err() || end.is_ok(), "closed, one way or the other");
        // Half a request, and gone while an upgrade is waited for.
        drop(connect().write_all(b"{\"command\":"));
        let mut waiting = connect();
        waiting.write_all(b"{\"command\":\"upgrade\",\"wait\":\"retired\"}\n").unwrap();
        drop(waiting);
        master.wait_status("upgraded", |status| status.active_generation == Some(2));
        master.signal(Signal::TERM);
        master.ended(0);
    });
}
