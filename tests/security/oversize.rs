//! Too much of everything: refused or cut, with words that say so, and without a trace in the master's memory.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;

use super::{ask, beside_worker, let_go, memory_kib};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::master::Master;
use crate::support::world::{Need, world};

/// What the master's memory may have grown by, in KiB. Buffers, and what the allocator keeps.
const GROWTH_KIB: u64 = 8 * 1024;

/// Does it, and demands that the master's memory is as before.
fn within_memory<T>(master: &Master, what: &str, something: impl FnOnce() -> T) -> T {
    let before = memory_kib(master.pid());
    let done = something();
    let after = memory_kib(master.pid());
    assert!(after <= before + GROWTH_KIB, "{what}: {before} KiB, now {after}");
    done
}

fn grow(path: &Path, bytes: u64) {
    fs::File::options().append(true).create(true).open(path).unwrap().set_len(bytes).unwrap();
}

#[test]
fn large_files_are_refused() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain").workers(1);
        let master = Master::start(world, &app);
        let before = master.serving();
        let refused = |what: &str, words: &[&str]| {
            let upgrade = within_memory(&master, what, || ask(world, "upgrade --wait"));
            let is_told = words.iter().all(|word| upgrade.stderr.contains(word));
            assert!(matches!(upgrade.code, 1 | 2) && is_told, "{upgrade:#?}");
            let check = master.cli("check");
            assert!(words.iter().all(|word| check.stderr.contains(word)), "{check:#?}");
        };
        grow(&app.path, 100 << 20);
        refused("config", &["app.toml", "larger than 1 MiB"]);
        let environment = world.path("environment");
        app.clone().app(format!("environment_file = {environment:?}")).write();
        // Each line is as it should be.
        fs::write(&environment, "A_NAME=a value\n".repeat(100_000)).unwrap();
        refused("environment file", &["environment", "larger than 1 MiB"]);
        grow(&environment, 100 << 20);
        refused("environment file", &["environment", "larger than 1 MiB"]);
        assert_eq!(master.serving(), before);
        app.write();
        master.upgrade();
        master.stop();
    });
}

#[test]
fn large_requests_are_refused() {
    world(&[], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode plain").workers(1));
        within_memory(&master, "requests", || {
            for _ in 0..20 {
                let mut client = UnixStream::connect(world.path("run/control.sock")).unwrap();
                client.set_read_timeout(Some(PATIENCE)).unwrap();
                // The master hangs up before all of it is there.
                let _ = client.write_all(&vec![b'x'; 10 << 20]);
                let mut said = [0; 4096];
                let count = client.read(&mut said).unwrap();
                let said = String::from_utf8_lossy(&said[..count]);
                assert!(said.contains("more than the 65536 allowed"), "{said}");
            }
        });
        master.upgrade();
        master.stop();
    });
}

#[test]
fn large_notifications_are_ignored() {
    world(&[Need::Python], |world| {
        let python = "\
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
for size in [4096, 100_000]:
    notify.sendto(b'STATUS=' + b'x' * size, os.environ['NOTIFY_SOCKET'])
notify.sendto(b'STATUS=' + 'ü'.encode() * 2000, os.environ['NOTIFY_SOCKET'])
";
        let master = Master::start(world, &beside_worker(world, "--mode sdk", python).workers(1));
        within_memory(&master, "notifications", || let_go(world));
        let status = master.wait_status("told", |status| status.generations[0].workers[0].status.is_some());
        assert_eq!(status.generations[0].workers[0].status, Some("ü".repeat(200)));
        let log = master.log();
        assert!(log.contains("is not understood: ignored") && log.contains("more than 4096 bytes"), "{log}");
        // The same from a stranger.
        let stranger = UnixDatagram::unbound().unwrap();
        stranger.send_to(&[b'x'; 100_000], world.path("run/control.sock.notify")).unwrap();
        master.upgrade();
        master.stop();
    });
}

#[test]
fn large_output_is_passed_on_in_pieces() {
    const BYTES: usize = 10 << 20;
    world(&[Need::Python], |world| {
        let python = format!("os.write(1, b'begun ')\nprint('x' * {BYTES})\nsys.stdout.flush()");
        let worker = beside_worker(world, "--mode sdk", &python).workers(1);
        let check = "check = [\"python3\", \"-c\", \"print('y' * (10 << 20)); raise SystemExit(3)\"]";
        let app = worker.clone().upgrade("bake = \"1s\"").upgrade(check);
        let master = Master::start(world, &app);
        within_memory(&master, "output", || {
            let_go(world);
            master.status();
        });
        let (code, receipt) = within_memory(&master, "a check's output", || master.failing_upgrade());
        assert_eq!(code, 1, "{receipt:#?}");
        let reason = receipt.reason.unwrap();
        assert!(reason.contains("yyyyy") && reason.len() < 8192, "{} bytes: {reason:.200}", reason.len());
        let printed = fs::read(world.path("master.out")).unwrap();
        let longest = printed.split(|byte| *byte == b'\n').map(<[u8]>::len).max().unwrap();
        assert!(longest < 4096, "a line of {longest} bytes");
        let count = |wanted: u8| printed.iter().filter(|byte| **byte == wanted).count();
        assert!(count(b'x') >= BYTES && count(b'y') >= BYTES, "{} and {}", count(b'x'), count(b'y'));
        worker.write();
        master.upgrade();
        master.stop();
    });
}
