//! An app under the shipped unit.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::{Duration, Instant};

use reuseportd_wire::status::{Receipt, Status};

use crate::support::PATIENCE;
use crate::support::machine::{Machine, WORKER};
use crate::support::process::{Done, Running};
use crate::support::world::World;

/// `reuseportd@web` on a machine.
#[derive(Debug)]
pub(crate) struct Unit<'a> {
    machine: &'a Machine,
    world: &'a World,
}

impl<'a> Unit<'a> {
    /// The app, with the difficult worker under these options; not started yet.
    pub(crate) fn new(world: &'a World, machine: &'a Machine, options: &str) -> Unit<'a> {
        let unit = Unit { machine, world };
        unit.configure(options, &[]);
        unit
    }

    /// Writes the config: two workers with these options, and lines for its tables.
    pub(crate) fn configure(&self, options: &str, lines: &[(&str, &str)]) {
        let command: Vec<&str> = std::iter::once(WORKER).chain(options.split_whitespace()).collect();
        let mut text = String::new();
        for table in ["[app]", "[[listen]]", "[upgrade]"] {
            writeln!(text, "{table}").unwrap();
            match table {
                "[app]" => writeln!(text, "command = {command:?}\nworkers = 2").unwrap(),
                "[[listen]]" => writeln!(text, "address = \"{}\"", self.world.address).unwrap(),
                _ => {}
            }
            for (_, line) in lines.iter().filter(|(of, _)| *of == table) {
                writeln!(text, "{line}").unwrap();
            }
        }
        self.machine.write("/etc/reuseportd/web.toml", &text);
    }

    /// Adds settings to the unit, as an operator would.
    pub(crate) fn drop_in(&self, lines: &str) {
        self.machine.write("/etc/systemd/system/reuseportd@web.service.d/test.conf", lines);
        self.machine.tell("systemctl daemon-reload");
    }

    /// `systemctl VERB reuseportd@web`.
    pub(crate) fn systemctl(&self, verb: &str) -> Done {
        self.begin(verb).finish(PATIENCE)
    }

    /// The same beside the test.
    pub(crate) fn begin(&self, verb: &str) -> Running {
        self.machine.begin(&format!("systemctl {verb} reuseportd@web"))
    }

    /// The same, and it must succeed; how long it took.
    pub(crate) fn succeed(&self, verb: &str) -> Duration {
        let began = Instant::now();
        let done = self.systemctl(verb);
        assert_eq!(done.code, 0, "{verb}: {done:#?}\n{}", self.journal());
        began.elapsed()
    }

    /// Sends the master a signal.
    pub(crate) fn signal_master(&self, signal: &str) {
        self.succeed(&format!("kill --kill-whom=main --signal={signal}"));
    }

    /// A property of the unit as systemd has it.
    pub(crate) fn property(&self, name: &str) -> String {
        self.machine.tell(&format!("systemctl show --value --property={name} reuseportd@web"))
    }

    /// Waits until a property of the unit is as wanted. Each look is a round trip to systemd, which paces the loop.
    pub(crate) fn wait_property(&self, name: &str, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self.property(name);
            if wanted(&value) {
                return value;
            }
            assert!(Instant::now() < deadline, "{name} stays {value:?}\n{}", self.journal());
        }
    }

    /// Asks the master for its status until it is as wanted.
    pub(crate) fn wait_status(&self, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // None can be reached while systemd restarts it.
            let done = self.cli("status --json");
            if let Some(status) = serde_json::from_str(&done.stdout).ok().filter(&wanted) {
                return status;
            }
            assert!(Instant::now() < deadline, "never {what}: {done:#?}\n{}", self.journal());
        }
    }

    pub(crate) fn status(&self) -> Status {
        self.wait_status("reachable", |_| true)
    }

    /// What became of the last upgrade.
    pub(crate) fn receipt(&self) -> Receipt {
        self.status().last_upgrade.expect("there was an upgrade")
    }

    /// A subcommand, as it would be typed on the machine.
    pub(crate) fn cli(&self, words: &str) -> Done {
        self.machine.run(&format!("reuseportd {words} --config /etc/reuseportd/web.toml"))
    }

    /// The pids of the workers of the generation that serves.
    pub(crate) fn workers(&self) -> BTreeSet<u32> {
        let status = self.status();
        let active = status.generations.iter().find(|one| Some(one.generation) == status.active_generation);
        let workers = active.expect("some generation serves").workers.iter();
        workers.map(|worker| worker.pid.expect("it runs")).collect()
    }

    /// Every process of the unit.
    pub(crate) fn processes(&self) -> BTreeSet<u32> {
        // The cgroup is gone with its last process.
        let files = self.machine.run(
            "cat /sys/fs/cgroup/system.slice/system-reuseportd.slice/reuseportd@web.service/cgroup.procs",
        );
        files.stdout.lines().map(|pid| pid.parse().unwrap()).collect()
    }

    /// What it logged.
    pub(crate) fn journal(&self) -> String {
        self.machine.run("journalctl --no-pager --output=cat --lines=40 --unit=reuseportd@web").stdout
    }

    /// Whether somebody listens on the service's address.
    pub(crate) fn answers(&self) -> bool {
        std::net::TcpStream::connect(self.world.address).is_ok()
    }

    /// After a stop: no process, no file, no listener.
    pub(crate) fn nothing_is_left(&self) {
        assert_eq!(self.processes(), BTreeSet::new(), "{}", self.journal());
        assert!(!self.answers(), "somebody still listens");
        let files = self.machine.run("find /run/reuseportd ! -type d").stdout;
        assert!(files.is_empty(), "{files}");
    }
}
