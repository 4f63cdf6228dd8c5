//! Sockets that systemd keeps: they are there before the service and after it.

use super::unit::Unit;
use super::with_each_systemd;
use crate::support::load::{Load, spec};
use crate::support::machine::{Systemd, machine};

with_each_systemd!(reloads_and_restarts_lose_nothing);

fn reloads_and_restarts_lose_nothing(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode activated");
        unit.configure("--mode activated", &[("[[listen]]", "bind = \"master\"")]);
        let socket = format!("[Socket]\nListenStream={}\n", world.address);
        machine.write("/etc/systemd/system/reuseportd@web.socket", &socket);
        machine.tell("systemctl daemon-reload && systemctl start reuseportd@web.socket");
        // The first client's connection starts the service.
        let load = Load::start(spec(world).rate(300.0).slow(10));
        let listener = &unit.status().listeners[0];
        assert!(listener.engine_reason.contains("from the service manager"), "{listener:?}");
        for generation in 2..=6 {
            unit.succeed("reload");
            load.answered_by(generation);
        }
        unit.succeed("restart");
        load.answered_by(1);
        unit.signal_master("SIGKILL");
        unit.wait_status("followed", |status| status.master.adopted);
        unit.succeed("reload");
        load.answered_by(2);
        let report = load.end();
        assert_eq!(report.lost(), 0, "{report}\n{}", unit.journal());
        // Without it the same restart loses.
        machine.tell("systemctl stop reuseportd@web.socket reuseportd@web");
        unit.succeed("start");
        let load = Load::start(spec(world).rate(300.0).slow(10));
        unit.succeed("restart");
        load.answered(100);
        let report = load.end();
        assert!(report.lost() > 0, "the load shows nothing: {report}");
        unit.succeed("stop");
        unit.nothing_is_left();
    });
}
