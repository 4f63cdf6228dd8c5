//! Messages and requests of those who mean no good: floods, stalls, halves.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::mpsc::{self, TryRecvError};
use std::thread;

use super::descriptors::recovers;
use super::{Fault, Outcome, under_load};
use crate::security::{begin, beside_worker, descriptors, memory_kib, over};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::load::{Load, slow_accepts};
use crate::support::master::Master;
use crate::support::world::{Need, World};

const ENGINES: &[&str] = &["ebpf", "cbpf"];

/// What a flood may leave in the master's memory, in KiB.
const GROWTH_KIB: u64 = 16 * 1024;

/// Something happens, under load; nothing of it stays with the master.
fn amid(world: &World, app: &App, load: &dyn Fn() -> Load, what: impl FnOnce(&Master<'_>, &Load)) -> Outcome {
    let master = Master::start(world, app);
    let load = load();
    let before = (descriptors(master.pid()), memory_kib(master.pid()));
    what(&master, &load);
    master.wait_status("as small as before", |_| {
        let after = (descriptors(master.pid()), memory_kib(master.pid()));
        after.0 <= before.0 + 40 && after.1 <= before.1 + GROWTH_KIB
    });
    recovers(master, load)
}

const NOTIFICATIONS: u32 = 100_000;

#[test]
fn notifications_of_a_stranger() {
    under_load(
        &Fault {
            name: "100,000 notifications at once",
            when: "upgrade; from a process that is no worker's",
            then: "none is believed; ten in ten seconds are logged, the others counted; the workers' own get through",
            lost: "",
        },
        &[],
        ENGINES,
        slow_accepts,
        |world, engine, load| {
            let app = App::test_worker(world, "--mode plain --accept-delay 5").engine(engine);
            amid(world, &app, load, |master, _| {
                let path = world.path("run/control.sock.notify");
                thread::scope(|scope| {
                    let (upgrading, upgraded) = mpsc::channel::<()>();
                    let path = &path;
                    scope.spawn(move || {
                        let stranger = UnixDatagram::unbound().unwrap();
                        let mut sent = 0;
                        while sent < NOTIFICATIONS || upgraded.try_recv() == Err(TryRecvError::Empty) {
                            // It waits for room, so that the master has to read each of them.
                            stranger.send_to(b"READY=1\nSTATUS=flood", path).unwrap();
                            sent += 1;
                        }
                    });
                    master.upgrade();
                    drop(upgrading);
                });
                let status = master.status();
                assert!(status.generations[0].workers.iter().all(|worker| worker.status.is_none()));
                let told = master.log().matches("from no worker's process: ignored").count();
                assert!((1..=100).contains(&told), "told {told} times");
            })
        },
    );
}

#[test]
fn notifications_of_a_worker() {
    under_load(
        &Fault {
            name: "100,000 notifications at once",
            when: "upgrade; from a worker",
            then: "512 are read before others have their turn; the new workers' own get through",
            lost: "",
        },
        &[Need::Python],
        ENGINES,
        slow_accepts,
        |world, engine, load| {
            let python = "\
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ['NOTIFY_SOCKET'])
for count in range(100_000):
    notify.send(b'READY=1\\nWATCHDOG=1\\nSTATUS=flood %d' % count)";
            let options = "--mode plain --accept-delay 5";
            let app = beside_worker(world, options, python).engine(engine);
            amid(world, &app, load, |master, _| {
                let flood = begin(world);
                master.wait_status("flooded", |status| {
                    let mut workers = status.generations.iter().flat_map(|one| &one.workers);
                    workers.any(|worker| worker.status.as_ref().is_some_and(|text| text.contains("flood")))
                });
                master.upgrade();
                over(world, flood);
            })
        },
    );
}

/// A control client that has said this, and reads nothing.
fn client(world: &World, words: &[u8]) -> UnixStream {
    let mut client = UnixStream::connect(world.path("run/control.sock")).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(words).unwrap();
    client
}

fn answer(mut client: UnixStream) -> String {
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

const STATUS: &[u8] = b"{\"command\":\"status\"}\n";

#[test]
fn control_clients_that_stall() {
    under_load(
        &Fault {
            name: "1,000 control clients that stay",
            when: "any time: with nothing said, half a request, or 400 KiB of answer unread",
            then: "256 are kept; the oldest that wait for no outcome are told so and hung up on; status, upgrade and a request byte by byte are answered at once",
            lost: "",
        },
        &[],
        ENGINES,
        slow_accepts,
        |world, engine, load| {
            let app = App::test_worker(world, "--mode sdk --accept-delay 5").engine(engine);
            amid(world, &app, load, |master, load| {
                long_receipts(world, master, &app);
                let of_everyone = |n: usize| match n % 20 {
                    0 => client(world, b"{\"command\":\"receipts\"}\n"),
                    1..10 => client(world, b"{\"command\":"),
                    _ => client(world, b""),
                };
                let clients: Vec<UnixStream> = (0..1000).map(of_everyone).collect();
                let mut slow = client(world, b"");
                STATUS.iter().for_each(|byte| slow.write_all(&[*byte]).unwrap());
                assert!(answer(slow).starts_with("{\"reply\":\"status\""));
                assert!(answer(client(world, STATUS)).starts_with("{\"reply\":\"status\""));
                master.upgrade();
                load.answered(100);
                assert!(descriptors(master.pid()) < 400);
                let mut clients = clients.into_iter();
                let first = answer(clients.nth(1).unwrap());
                assert!(first.contains("more than 256 clients"), "{first}");
                let read_late = answer(clients.nth(978).unwrap());
                assert!(read_late.len() > 300_000 && read_late.ends_with("}\n"), "{} bytes", read_late.len());
                let log = master.log();
                assert!(log.contains("a control client is turned away: more than 256"), "{log}");
                drop(clients);
                master.wait_status("rid of them", |_| descriptors(master.pid()) < 80);
            })
        },
    );
}

/// Upgrades that fail with so much to say that the receipts don't fit into a socket's buffer.
fn long_receipts(world: &World, master: &Master<'_>, app: &App) {
    let noise = "for line in 1 2 3 4 5 6 7 8 9 10; do printf '%0300d' 0 | tr 0 '\\001'; echo; done; exit 3";
    App::new(world, ["/bin/sh", "-c", noise]).engine(app.engine).workers(1).write();
    for _ in 0..24 {
        assert_eq!(master.cli("upgrade --wait").code, 1);
    }
    app.write();
}

#[test]
fn a_client_leaves_in_an_upgrade() {
    under_load(
        &Fault {
            name: "the client of `upgrade --wait` disconnects",
            when: "upgrade: new workers starting",
            then: "the upgrade goes on; log and `status` have its receipt",
            lost: "",
        },
        &[],
        ENGINES,
        slow_accepts,
        |world, engine, load| {
            let app = App::test_worker(world, "--mode sdk --accept-delay 5 --ready-delay 300").engine(engine);
            amid(world, &app, load, |master, load| {
                let mut waiting = client(world, b"{\"command\":\"upgrade\",\"wait\":\"retired\"}\n");
                let mut said = [0; 21];
                waiting.read_exact(&mut said).unwrap();
                assert_eq!(&said, b"{\"reply\":\"accepted\"}\n");
                drop(waiting);
                load.heard_from(2);
                let done = master.wait_status("completed", |status| status.last_upgrade.is_some());
                let receipt = done.last_upgrade.unwrap();
                assert_eq!(receipt.to, Some(2), "{receipt:#?}");
                assert!(receipt.reason.is_none(), "{receipt:#?}");
            })
        },
    );
}

#[test]
fn nonsense_on_a_channel() {
    under_load(
        &Fault {
            name: "40,000 messages on a handover channel: garbage, too long, with 253 descriptors each",
            when: "upgrade; from a worker that serves all the while",
            then: "each is logged or answered with `unknown`, no descriptor is kept; the worker serves on, and retires as it should",
            lost: "",
        },
        &[Need::Python],
        ENGINES,
        slow_accepts,
        |world, engine, load| {
            let python = "\
channel = socket.socket(fileno=int(os.environ['REUSEPORTD_CHANNEL']))
null = os.open('/dev/null', os.O_RDONLY)
for count in range(10_000):
    for text, fds in [(b'\\xff\\x00', 0), (b'x' * 5000, 0), (b'taken ' + b'y' * 3000, 253), (b'hello', 3)]:
        socket.send_fds(channel, [text], [null] * fds)
    if count == 100: open(sys.argv[0] + '.flows', 'w').write('yes')";
            let app = beside_worker(world, "--mode sdk --accept-delay 5", python).engine(engine);
            amid(world, &app, load, |master, _| {
                let flood = begin(world);
                master.wait_status("flooded", |_| fs::metadata(world.path("beside.py.flows")).is_ok());
                master.upgrade();
                over(world, flood);
                let log = master.log();
                assert!(log.contains("a worker's message is not understood"), "nothing is told");
            })
        },
    );
}

#[test]
fn a_worker_prints_without_end() {
    under_load(
        &Fault {
            name: "100 MB of output without a line break: text, bytes, terminal sequences",
            when: "upgrade; printed by a worker",
            then: "passed on in tagged pieces of 4 KiB, 64 KiB before others have their turn",
            lost: "",
        },
        &[Need::Python],
        ENGINES,
        slow_accepts,
        |world, engine, load| {
            let python = "\
piece = b'text \\x1b[31m\\x00\\xff\\x9b' * 10_000
for count in range(10**8 // len(piece)): os.write(1, piece)
os.write(1, b'\\nthe end\\n')";
            let app = beside_worker(world, "--mode sdk --accept-delay 5", python).engine(engine);
            amid(world, &app, load, |master, _| {
                let flood = begin(world);
                let out = world.path("master.out");
                let printed = || fs::metadata(&out).map_or(0, |file| file.len());
                master.wait_status("printing", |_| printed() > 1 << 20);
                let quiet = App::test_worker(world, "--mode sdk --accept-delay 5").engine(engine);
                quiet.write();
                master.upgrade();
                over(world, flood);
                assert!(printed() > 1 << 20);
            })
        },
    );
}
