//! Whose READY=1 it is. (That of strangers, of the same user and others: `notify`, `identity`.)

use std::fs;

use reuseportd_wire::status::{Outcome, WorkerState, WorkerStatus};

use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::master::Master;
use crate::support::world::{Need, world};

/// A child of the worker in seat 1, that would have the one in seat 0 be ready: as it is, from the other's process group if
/// it gets in, and without a parent.
const IMPOSTOR: &str = r#"
import os, socket, sys
victim = int(open(sys.argv[1]).read())
said = open(sys.argv[2], "w")
def ready(who):
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    print(who, file=said, flush=True)
ready("child")
try:
    os.setpgid(0, victim)
    ready("member")
except PermissionError:
    print("kept out", file=said, flush=True)
parent = os.getpid()
if os.fork() == 0:
    os.setsid()
    while os.getppid() == parent:
        os.sched_yield()
    ready("orphan")
"#;

#[test]
fn a_worker_cannot_make_another_one_ready() {
    world(&[Need::Python], |world| {
        let path = |name: &str| world.path(name).to_str().unwrap().to_owned();
        let (fifo, said) = (path("victim"), path("said"));
        fs::write(world.path("impostor.py"), IMPOSTOR).unwrap();
        crate::support::world::tool(&format!("mkfifo {fifo}"));
        let master = Master::start(world, &App::test_worker(world, "--mode plain").workers(2));
        let silent = test_worker("--mode plain --no-notify").join(" ");
        let ready = test_worker("--mode plain").join(" ");
        let script = format!(
            "if [ $REUSEPORTD_SEAT = 0 ]; then echo $$ >{fifo}; exec {silent}; fi\n\
             python3 {} {fifo} {said} & exec {ready}",
            path("impostor.py")
        );
        App::new(world, ["/bin/sh", "-c", &script]).workers(2).write();
        let upgrade = master.begin("upgrade --wait --json");
        master.wait_status("all is said, and the other is ready", |status| {
            let ready = |worker: &WorkerStatus| worker.seat == 1 && worker.state == WorkerState::Ready;
            status.generations.get(1).is_some_and(|new| new.workers.iter().any(ready))
                && fs::read_to_string(&said).is_ok_and(|said| said == "child\nkept out\norphan\n")
        });
        // The master has read all of it before it is asked this.
        let workers = &master.status().generations[1].workers;
        let states: Vec<_> = workers.iter().map(|worker| (worker.seat, worker.state)).collect();
        assert_eq!(states, [(0, WorkerState::Starting), (1, WorkerState::Ready)]);
        assert_eq!(master.cli("rollback --wait").code, 0);
        let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        assert!(master.log().contains("no worker's process"), "{}", master.log());
        master.stop();
    });
}
