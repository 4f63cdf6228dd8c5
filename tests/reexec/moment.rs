//! The moment in which there is no master, made long: what comes meanwhile waits for the next image.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use reuseportd_wire::status::{MasterState, Outcome, Status, WorkerState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use super::{Program, reexec};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::master::{Master, REUSEPORTD};
use crate::support::world::{Need, World, tool, world};

/// A pipe with a name. Both ends are held here, so that nobody who opens one waits for the other.
struct Gate {
    path: PathBuf,
    pipe: File,
}

impl Gate {
    fn new(world: &World, name: &str) -> Gate {
        let path = world.path(name);
        tool(&format!("mkfifo {}", path.display()));
        let pipe = File::options().read(true).write(true).open(&path).unwrap();
        Gate { path, pipe }
    }

    /// Lets the process go that waits here.
    fn open(&self) {
        (&self.pipe).write_all(b"go\n").unwrap();
    }

    /// Waits for a process to say that it is here.
    fn wait(&self) {
        let patience = Timespec::try_from(PATIENCE).unwrap();
        let came = poll(&mut [PollFd::new(&self.pipe, PollFlags::IN)], Some(&patience)).unwrap();
        assert_eq!(came, 1, "nobody comes to {}", self.path.display());
        BufReader::new(&self.pipe).read_line(&mut String::new()).unwrap();
    }
}

/// A program that has read the state, and then takes its time to become the next image.
struct Slow {
    here: Gate,
    go: Gate,
    program: Program,
}

impl Slow {
    fn new(world: &World) -> Slow {
        Slow { here: Gate::new(world, "here"), go: Gate::new(world, "go"), program: Program::new(world) }
    }

    /// From the next re-exec on there is no master, until the gate `go` is opened.
    fn arm(&self) {
        let (here, go) = (self.here.path.display(), self.go.path.display());
        self.program.become_script(&format!(
            "if [ \"$1\" != preflight ]; then echo here > {here}; read line < {go}; fi\nexec {REUSEPORTD} \"$@\""
        ));
    }
}

/// Its second generation says READY=1 when it is let. A client that says `half` makes it print half a line, and one
/// that says `rest` the other half and many more.
const WORKER: &str = "
import os, socket, sys
port, ready, said = sys.argv[1:]
listener = socket.create_server(('127.0.0.1', int(port)), reuse_port=True)
is_second = os.environ['REUSEPORTD_GENERATION'] == '2'
if is_second:
    open(ready).readline()
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])
if is_second:
    open(said, 'w').write('said\\n')
while True:
    connection = listener.accept()[0]
    wish = connection.recv(100)
    if wish == b'half':
        sys.stdout.write('the first half')
    elif wish == b'rest':
        sys.stdout.write(' and the second\\n')
        for n in range(5000):
            sys.stdout.write('line %d of many\\n' % n)
    sys.stdout.flush()
    connection.sendall(str(os.getpid()).encode())
    connection.close()
";

fn ask(world: &World, wish: &[u8]) -> String {
    let mut stream = TcpStream::connect(world.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(wish).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn what_comes_while_there_is_no_master_is_not_lost() {
    world(&[Need::Python], |world| {
        let slow = Slow::new(world);
        let (ready, said) = (Gate::new(world, "ready"), Gate::new(world, "said"));
        let paths = [&ready, &said].map(|gate| gate.path.display().to_string());
        let app = App::new(world, ["python3", "-c", WORKER, "{port.default}", &paths[0], &paths[1]]);
        let master = slow.program.start(world, &app.workers(1));
        let worker = ask(world, b"half");
        let upgrade = master.begin("upgrade --wait --json");
        let starts = |status: &Status| status.generations.len() == 2;
        master.wait_status("launching", |status| {
            starts(status) && status.generations[1].workers[0].state == WorkerState::Starting
        });
        slow.arm();
        let waiting = master.begin("reexec");
        slow.here.wait();

        ready.open();
        said.wait();
        assert_eq!(ask(world, b"rest"), worker, "the old generation serves");
        let status = master.begin("status --json");
        for signal in [Signal::HUP, Signal::TTIN, Signal::TTOU, Signal::USR1, Signal::HUP] {
            master.signal(signal);
        }
        slow.go.open();

        let done = waiting.finish(PATIENCE);
        assert_eq!((done.code, done.stdout.as_str()), (0, "re-executed\n"), "{done:#?}");
        let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
        assert_eq!((code, receipt.outcome, receipt.to), (0, Outcome::Completed, Some(2)), "{receipt:#?}");
        assert_eq!(status.finish(PATIENCE).code, 0);
        // The signal asked for one more.
        let served =
            |status: &Status| status.active_generation == Some(3) && status.state == MasterState::Steady;
        master.wait_status("upgraded twice", |status| served(status) && status.generations.len() == 1);
        let told = world.read("master.out");
        let lines = (0..5000).map(|n| format!("line {n} of many"));
        let wanted = std::iter::once("the first half and the second".to_owned()).chain(lines);
        let wanted: Vec<String> = wanted.map(|line| format!("[g1 s0 {worker}] {line}")).collect();
        let told: Vec<&str> = told.lines().filter(|line| line.starts_with("[g1 ")).collect();
        assert!(told == wanted, "{} lines, the first is {:?}", told.len(), told.first());
        master.stop();
    });
}

#[test]
fn a_stop_that_comes_while_there_is_no_master_is_not_lost() {
    world(&[], |world| {
        let slow = Slow::new(world);
        let app = App::test_worker(world, "--mode sdk").workers(2);
        for signal in [Signal::TERM, Signal::INT, Signal::QUIT] {
            slow.program.link_to(REUSEPORTD.as_ref());
            let master = slow.program.start(world, &app);
            slow.arm();
            master.signal(Signal::USR2);
            slow.here.wait();
            master.signal(signal);
            slow.go.open();
            master.ended(0);
        }
    });
}

#[test]
fn a_worker_that_ends_while_there_is_no_master_is_replaced() {
    world(&[], |world| {
        let slow = Slow::new(world);
        let app = App::test_worker(world, "--mode sdk --code 7").workers(2);
        let master = slow.program.start(world, &app);
        let before = master.serving();
        slow.arm();
        master.signal(Signal::USR2);
        slow.here.wait();
        crate::support::process::signal(before[1], Signal::KILL);
        slow.go.open();
        let status = master.wait_status("filled again", |status| {
            let worker = &status.generations[0].workers[1];
            worker.restarts == 1 && worker.state == WorkerState::Serving
        });
        assert_eq!((status.master.reexecs, status.generations[0].workers[0].pid), (1, Some(before[0])));
        // It is a child as before: how it ended is known.
        let log = master.log();
        let told = format!("worker {} was killed by SIGKILL", before[1]);
        assert!(log.contains(&told), "{log}");
        master.stop();
    });
}

/// The delay of each turn: together they cover a re-exec from its wish to its end.
fn delays() -> impl Iterator<Item = Duration> {
    (0..24).map(|turn| Duration::from_millis(3) * turn)
}

#[test]
fn no_wish_for_an_upgrade_is_lost() {
    world(&[], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode plain").workers(1));
        for (delay, active) in delays().zip(2..) {
            let count = master.status().master.reexecs;
            master.signal(Signal::USR2);
            thread::sleep(delay); // no wait for anything: each turn meets another moment of the re-exec
            master.signal(Signal::HUP);
            master.wait_status("upgraded", |status| {
                let is_done = status.active_generation == Some(active) && status.state == MasterState::Steady;
                is_done && status.master.reexecs == count + 1 && status.generations.len() == 1
            });
        }
        master.stop();
    });
}

#[test]
fn a_storm_of_signals_is_survived() {
    world(&[], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode plain").workers(1));
        let storm = [Signal::HUP, Signal::USR2, Signal::TTIN, Signal::USR2, Signal::TTOU, Signal::USR1];
        for (turn, signal) in storm.iter().cycle().take(600).enumerate() {
            master.signal(*signal);
            // Now and then the master is let come to its senses.
            if turn % 20 == 0 {
                master.status();
            }
        }
        let calm = |status: &Status| status.state == MasterState::Steady && status.generations.len() == 1;
        let status = master.wait_status("calm again", calm);
        assert!(status.master.reexecs > 1 && status.active_generation > Some(1), "{status:#?}");
        reexec(&master);
        master.upgrade();
        assert!(!master.log().contains("event=\"bug\""), "{}", master.log());
        master.stop();
    });
}

#[test]
fn a_stop_around_a_re_exec_ends_gracefully() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode sdk").workers(1);
        for delay in delays().step_by(3) {
            let master = Master::start(world, &app);
            master.signal(Signal::USR2);
            thread::sleep(delay); // no wait for anything: each turn meets another moment of the re-exec
            master.signal(Signal::TERM);
            master.ended(0);
        }
        let master = Master::start(world, &app);
        master.signal(Signal::TERM);
        master.signal(Signal::USR2);
        master.ended(0);
        assert!(!fs::exists(world.path("run")).unwrap());
    });
}
