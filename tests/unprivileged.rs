//! An ordinary user without any capability: the other engine, the same promise.

use std::os::unix::fs::{PermissionsExt, chown};

use reuseportd_wire::status::Engine;

use crate::support::app::App;
use crate::support::load::{Load, slow_accepts};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::rounds;
use crate::support::world::{Need, example, world};

/// Not root, and nobody else here.
const UID: u32 = 61_234;

#[test]
fn an_ordinary_user_loses_nothing() {
    world(&[Need::Root], |world| {
        let copy = |from: &std::path::Path, name: &str| {
            let to = world.path(name);
            std::fs::copy(from, &to).unwrap();
            std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755)).unwrap();
            to
        };
        let program = copy(REUSEPORTD.as_ref(), "reuseportd");
        let worker = copy(&example("test_worker"), "worker");
        chown(world.path(""), Some(UID), Some(UID)).unwrap();
        for mode in ["plain", "sdk"] {
            let command = [worker.to_str().unwrap(), "--mode", mode, "--accept-delay", "5"];
            let master = Master::start_as(world, &App::new(world, command), program.clone(), UID);
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
