//! The kernel refuses what steers: programs, maps, or the workers' sockets.

use std::process::Command;

use reuseportd_wire::status::{MasterState, Outcome as Upgraded};

use super::descriptors::{comes_to_nothing, recovers, slow_workers};
use super::{Fault, Outcome, under_load};
use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::load::{Load, slow_accepts};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::strace::{Refused, STRACE};
use crate::support::world::{Need, World};
use crate::unprivileged::UID;

/// From the beginning of an upgrade on, these calls of the master fail, until it has been said why it comes to nothing.
fn refused_from_the_beginning(
    world: &World,
    engine: &'static str,
    load: &dyn Fn() -> Load,
    (call, error): (&str, &str),
    words: &[&str],
) -> Outcome {
    let master = Master::start(world, &slow_workers(world, engine));
    let load = load();
    let before = master.serving();
    let refused = Refused::calls(world, master.pid(), call, error, &[]);
    let upgrade = master.begin("upgrade --wait --json");
    // The way back can be refused as well.
    master.wait_status("failing", |_| master.log().contains("event=\"failing\""));
    load.answered(200);
    assert!(refused.end() > 0, "nothing was refused");
    let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
    assert_eq!((code, receipt.outcome), (1, Upgraded::RolledBack), "{receipt:#?}");
    let reason = receipt.reason.unwrap_or_default();
    for word in words {
        assert!(reason.contains(word), "{word:?} is not in the reason: {reason}");
    }
    assert_eq!(master.serving(), before, "the old workers were touched");
    recovers(master, load)
}

const STEER_BACK: &str =
    "rolled back, the reason names listener and error; what is in force stays so until the way back is open";

#[test]
fn the_program_is_not_attached() {
    under_load(
        &Fault {
            name: "steering program refused: ENOMEM (setsockopt)",
            when: "upgrade: the program is attached",
            then: STEER_BACK,
            lost: "",
        },
        &[STRACE],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let words = ["refused to steer listener \"default\"", "Cannot allocate memory"];
            refused_from_the_beginning(world, engine, load, ("setsockopt", "ENOMEM"), &words)
        },
    );
}

#[test]
fn the_map_is_full() {
    under_load(
        &Fault {
            name: "map full: E2BIG (bpf)",
            when: "upgrade: the new listeners are put into the array",
            then: STEER_BACK,
            lost: "",
        },
        &[STRACE],
        &["ebpf"],
        slow_accepts,
        |world, engine, load| {
            let words = ["refused to steer listener \"default\"", "Argument list too long"];
            refused_from_the_beginning(world, engine, load, ("bpf", "E2BIG"), &words)
        },
    );
}

#[test]
fn no_map_for_a_new_address() {
    under_load(
        &Fault {
            name: "map refused: ENOMEM (bpf)",
            when: "upgrade that adds an address",
            then: "refused, the reason names the map; nothing has changed",
            lost: "",
        },
        &[STRACE],
        &["ebpf"],
        slow_accepts,
        |world, engine, load| {
            let app = slow_workers(world, engine);
            let master = Master::start(world, &app);
            let load = load();
            let mut more = app.clone();
            more.listen.push(("more".into(), std::net::SocketAddr::from((world.address.ip(), 8081))));
            more.write();
            let refused = Refused::calls(world, master.pid(), "bpf", "ENOMEM", &[]);
            comes_to_nothing(
                &master,
                Upgraded::Refused,
                &["no steering for a new listener", "Cannot allocate memory"],
            );
            assert!(refused.end() > 0);
            recovers(master, load)
        },
    );
}

#[test]
fn a_switch_and_the_way_back_are_refused() {
    under_load(
        &Fault {
            name: "steering refused: EPERM (bpf, setsockopt)",
            when: "upgrade: the switch after a canary, and the way back",
            then: "old and new workers go on sharing as in the canary; rolled back as soon as the kernel lets it",
            lost: "",
        },
        &[STRACE],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let app = slow_workers(world, engine);
            let master = Master::start(world, &app);
            let load = load();
            let before = master.serving();
            app.clone().upgrade("canary = [{ share = \"50%\", hold = \"700ms\" }]").write();
            let upgrade = master.begin("upgrade --wait --json");
            master.wait_status("on trial", |status| status.state == MasterState::Canary);
            let refused = Refused::calls(world, master.pid(), "bpf,setsockopt", "EPERM", &[]);
            master.wait_status("failing", |_| master.log().contains("event=\"failing\""));
            load.answered(200);
            assert!(refused.end() > 0, "nothing was refused");
            let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
            assert_eq!((code, receipt.outcome), (1, Upgraded::RolledBack), "{receipt:#?}");
            let reason = receipt.reason.unwrap_or_default();
            assert!(reason.contains("Operation not permitted"), "{reason}");
            assert_eq!(master.serving(), before, "the old workers were touched");
            app.write();
            recovers(master, load)
        },
    );
}

#[test]
fn the_workers_descriptors_cannot_be_taken() {
    under_load(
        &Fault {
            name: "the worker's sockets can't be taken: EPERM (no CAP_SYS_PTRACE)",
            when: "upgrade to unmodified workers of another user",
            then: "rolled back at once, the reason says what the master lacks; the old workers are not touched",
            lost: "",
        },
        &[Need::Root, Need::Runs("setpriv", &["--version"])],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let app = slow_workers(world, engine).app(format!("user = \"{UID}\"\ngroup = \"{UID}\""));
            let mut command = Command::new("setpriv");
            command.args(["--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", REUSEPORTD]);
            let mut master = Master::launch(world, &app, command);
            master.wait_ready();
            let load = load();
            let mut unmodified: App = app.clone();
            unmodified.command = test_worker("--mode plain --accept-delay 5");
            unmodified.write();
            comes_to_nothing(&master, Upgraded::RolledBack, &["CAP_SYS_PTRACE", "pidfd_getfd"]);
            app.write();
            recovers(master, load)
        },
    );
}
