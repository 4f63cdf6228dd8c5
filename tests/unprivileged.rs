//! An ordinary user without any capability: the other engine, the same promise.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use reuseportd_wire::status::{Engine, Outcome};

use crate::support::app::App;
use crate::support::load::{Load, slow_accepts};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::rounds;
use crate::support::world::{Need, World, example, world};

/// Not root, and nobody else here; the next one neither.
pub(crate) const UID: u32 = 61_234;

/// The program and the difficult worker where every user may run them, in a directory that is theirs.
pub(crate) fn installed(world: &World) -> (PathBuf, String) {
    let copy = |from: &Path, name: &str| {
        let to = world.path(name);
        fs::copy(from, &to).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).unwrap();
        to
    };
    chown(world.path(""), Some(UID), Some(UID)).unwrap();
    let worker = copy(&example("test_worker"), "worker");
    (copy(REUSEPORTD.as_ref(), "reuseportd"), worker.to_str().unwrap().to_owned())
}

#[test]
fn an_ordinary_user_loses_nothing() {
    world(&[Need::Root], |world| {
        let (program, worker) = installed(world);
        for mode in ["plain", "sdk"] {
            let app = App::new(world, [&worker, "--mode", mode, "--accept-delay", "5"]);
            let master = Master::start_as(world, &app, program.clone(), UID);
            let status = master.status();
            let listener = &status.listeners[0];
            assert_eq!(listener.engine, Engine::Cbpf, "{listener:#?}");
            assert!(listener.engine_reason.contains("CAP_BPF"), "{listener:#?}");
            let load = Load::start(slow_accepts(world));
            for generation in 2..=rounds(3, 20) + 1 {
                master.hup();
                load.answered_by(generation);
            }
            load.end_lossless();
            master.stop();
        }
        crate::upgrade::control_loses(world, slow_accepts(world), 5);
    });
}

#[test]
fn a_limit_on_processes_is_a_reason() {
    world(&[Need::Root], |world| {
        let (program, worker) = installed(world);
        let mut app = App::new(world, [&worker, "--mode", "plain"]).workers(1);
        let mut command = Command::new("prlimit");
        command.arg("--nproc=8").arg(&program).uid(UID + 1).gid(UID + 1);
        chown(world.path(""), Some(UID + 1), None).unwrap();
        let mut master = Master::launch(world, &app, command);
        master.wait_ready();
        app.workers = 20;
        app.write();
        let (code, receipt) = master.failing_upgrade();
        let reason = receipt.reason.unwrap_or_default();
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{reason}");
        assert!(reason.contains("seat") && reason.contains("Resource temporarily unavailable"), "{reason}");
        app.workers = 1;
        app.write();
        master.upgrade();
        master.stop();
    });
}
