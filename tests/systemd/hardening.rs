//! The sandbox of the shipped unit: how tight it is, and that all works inside.

use std::fs;

use reuseportd_wire::status::{Engine, Trigger};

use super::unit::Unit;
use super::with_each_systemd;
use crate::support::load::{Load, spec};
use crate::support::machine::{Systemd, machine};
use crate::support::world::{example, repository};

with_each_systemd!(
    exposure_is_as_the_unit_says,
    all_works_inside_ebpf,
    all_works_inside_cbpf,
    nobody_needs_to_read_the_files_of_workers,
    so_reuseport_is_forced_with_the_drop_in,
);

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
        let user = "user = \"nobody\"\ncapabilities = [\"CAP_NET_BIND_SERVICE\"]\ncpu_affinity = \"seat\"";
        let unit = Unit::new(world, machine, "");
        for (mode, bind) in
            [("--mode plain", "worker"), ("--mode sdk", "worker"), ("--mode activated", "master")]
        {
            let bind = format!("bind = {bind:?}");
            let low = format!("{bind}\n[[listen]]\nname = \"low\"\naddress = \"127.0.0.1:80\"\n{bind}");
            let lines = [("[app]", user), ("[[listen]]", low.as_str())];
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

/// Program and variables are in a directory that is closed even to root without CAP_DAC_READ_SEARCH; and so are the
/// processes of a former master, known by their environment alone.
fn nobody_needs_to_read_the_files_of_workers(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        machine.tell("echo COLOUR=blue >/srv/web/environment");
        machine.tell("chown -R nobody /srv/web && chmod 0400 /srv/web/environment && chmod 0500 /srv/web/worker /srv/web");
        let unit = Unit::new(world, machine, "");
        let user = "user = \"nobody\"\nenvironment_file = \"/srv/web/environment\"";
        unit.configure("--mode plain", &[("[app]", user)]);
        unit.succeed("start");
        let load = Load::start(spec(world).rate(100.0));
        let generations = unit.status().generations;
        assert!(generations.iter().all(|one| one.executable.sha256.is_some()), "{generations:#?}");

        unit.signal_master("SIGSTOP");
        let keepers = machine.tell("grep -lzx 'keepe[r]' /proc/[0-9]*/cmdline");
        let keeper = keepers.strip_prefix("/proc/").and_then(|path| path.strip_suffix("/cmdline")).unwrap();
        machine.tell(&format!("kill -KILL {keeper}; rm /run/reuseportd/web/control.sock.journal"));
        unit.signal_master("SIGKILL");
        unit.wait_status("upgraded", |status| {
            let trigger = status.last_upgrade.as_ref().map(|receipt| receipt.trigger);
            trigger == Some(Trigger::Orphans) && status.generations.len() == 1
        });
        let log = machine.tell("journalctl --no-pager --unit=reuseportd@web");
        assert!(log.contains("2 workers have neither master nor keeper"), "{log}");
        assert!(!log.contains("orphan_unreachable"), "{log}");
        load.end_lossless();
        unit.succeed("stop");
        unit.nothing_is_left();
    });
}

/// By a program that never sets it, and over the death of a master.
fn so_reuseport_is_forced_with_the_drop_in(systemd: Systemd) {
    const CGROUP: &str = "/run/reuseportd/web/control.sock.cgroup";
    machine(systemd, true, |world, machine| {
        fs::copy(example("plain"), machine.path("/srv/web/plain")).unwrap();
        let unit = Unit::new(world, machine, "");
        let config = format!(
            "[app]\ncommand = [\"/srv/web/plain\", \"{{address.default}}\"]\nworkers = 2\nuser = \"nobody\"\n\
             [[listen]]\naddress = \"{}\"\nforce_reuseport = true\n[readiness]\nmethod = \"listen\"\n",
            world.address
        );
        machine.write("/etc/reuseportd/web.toml", &config);
        assert_ne!(unit.systemctl("start").code, 0);
        assert!(unit.journal().contains("ProtectControlGroups=no"), "{}", unit.journal());
        unit.succeed("stop");
        unit.drop_in(&fs::read_to_string(repository("deploy/force-reuseport.conf")).unwrap());
        unit.succeed("start");
        let load = Load::start(spec(world).rate(100.0));
        unit.succeed("reload");
        let path = machine.tell(&format!("readlink {CGROUP}"));
        assert!(path.contains("/reuseportd@web.service/reuseportd-web-"), "{path}");
        unit.signal_master("SIGKILL");
        unit.wait_status("adopted", |status| status.master.adopted);
        unit.succeed("reload");
        assert_eq!(machine.tell(&format!("readlink {CGROUP}")), path);
        load.end_lossless();
        unit.succeed("stop");
        unit.nothing_is_left();
        assert_ne!(machine.run(&format!("ls {path}")).code, 0, "the cgroup is left behind");
    });
}
