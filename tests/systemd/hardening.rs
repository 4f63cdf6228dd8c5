//! The sandbox of the shipped unit: how tight it is, and that all works inside.

use std::fs;

use reuseportd_wire::status::Engine;

use super::unit::Unit;
use super::with_each_systemd;
use crate::support::load::{Load, spec};
use crate::support::machine::{Systemd, machine};
use crate::support::world::repository;

with_each_systemd!(exposure_is_as_the_unit_says, all_works_inside_ebpf, all_works_inside_cbpf);

fn exposure_is_as_the_unit_says(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let _unit = Unit::new(world, machine, "");
        let report = machine.tell("systemd-analyze security --no-pager reuseportd@web");
        let level = report
            .lines()
            .find_map(|line| line.split_once("Overall exposure level for ")?.1.split(' ').nth(1));
        let level = level.unwrap_or_else(|| panic!("{report}"));
        let told = fs::read_to_string(repository("deploy/reuseportd@.service")).unwrap();
        assert!(told.contains(&format!("`systemd-analyze security` says {level}")), "{report}");
    });
}

fn all_works_inside_ebpf(systemd: Systemd) {
    all_works_inside(systemd, Engine::Ebpf);
}

fn all_works_inside_cbpf(systemd: Systemd) {
    all_works_inside(systemd, Engine::Cbpf);
}

/// As another user, on a low port, with a failed upgrade: what takes all the rights the master may have.
fn all_works_inside(systemd: Systemd, engine: Engine) {
    machine(systemd, engine == Engine::Ebpf, |world, machine| {
        let low = "name = \"default\"\n[[listen]]\nname = \"low\"\naddress = \"127.0.0.1:80\"";
        let user = "user = \"nobody\"\ncapabilities = [\"CAP_NET_BIND_SERVICE\"]\ncpu_affinity = \"seat\"";
        let lines = [("[app]", user), ("[[listen]]", low)];
        let unit = Unit::new(world, machine, "");
        for mode in ["--mode plain", "--mode sdk"] {
            unit.configure(mode, &lines);
            unit.succeed("start");
            let listeners = unit.status().listeners;
            assert!(listeners.iter().all(|listener| listener.engine == engine), "{listeners:#?}");
            let load = Load::start(spec(world).rate(100.0));
            unit.succeed("reload");
            unit.configure(
                &format!("{mode} --fail never-ready"),
                &[lines[0], lines[1], ("[upgrade]", "ready_timeout = \"300ms\"")],
            );
            assert_ne!(unit.systemctl("reload").code, 0);
            unit.configure(mode, &lines);
            unit.succeed("reload");
            load.answered_by(unit.status().active_generation.unwrap());
            load.end_lossless();
            unit.succeed("stop");
            unit.nothing_is_left();
        }
    });
}
