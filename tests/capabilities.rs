//! What a master can do besides: it keeps the capabilities it uses, and workers have what they are to have.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use reuseportd_wire::status::{Outcome, Status};
use rustix::fs::{XattrFlags, setxattr};
use rustix::thread::CapabilitySet;

use crate::identity::{CAPABILITIES, OTHER, UID, app, as_user, copy, fields};
use crate::reexec::reexec;
use crate::support::app::App;
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{kill, state_of};
use crate::support::world::{Need, World, world};

/// All that a master ever uses.
const USED: [CapabilitySet; 13] = [
    CapabilitySet::CHOWN,
    CapabilitySet::DAC_OVERRIDE,
    CapabilitySet::DAC_READ_SEARCH,
    CapabilitySet::FOWNER,
    CapabilitySet::KILL,
    CapabilitySet::SETGID,
    CapabilitySet::SETUID,
    CapabilitySet::SETPCAP,
    CapabilitySet::NET_BIND_SERVICE,
    CapabilitySet::NET_ADMIN,
    CapabilitySet::SYS_PTRACE,
    CapabilitySet::SYS_RESOURCE,
    CapabilitySet::BPF,
];

fn set(of: &[CapabilitySet]) -> CapabilitySet {
    of.iter().copied().collect()
}

/// What this thread has, and what it starts will have.
fn own() -> CapabilitySet {
    rustix::thread::capabilities(None).unwrap().permitted
}

fn bounds() -> CapabilitySet {
    let text = fs::read_to_string("/proc/thread-self/status").unwrap();
    let mask = text.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap().trim();
    CapabilitySet::from_bits_retain(u64::from_str_radix(mask, 16).unwrap())
}

/// From now on nothing this thread starts has them.
fn without(set: CapabilitySet) {
    for (_, one) in set.iter_names() {
        rustix::thread::remove_capability_from_bounding_set(one).unwrap();
    }
}

fn hex(set: CapabilitySet) -> String {
    format!("{:016x}", set.bits())
}

/// Capabilities as /proc shows them.
#[derive(Debug, Clone, Copy)]
struct Has {
    inheritable: CapabilitySet,
    permitted: CapabilitySet,
    effective: CapabilitySet,
    ambient: CapabilitySet,
    bounds: CapabilitySet,
}

impl Has {
    fn of(permitted: CapabilitySet) -> Has {
        let none = CapabilitySet::empty();
        Has { inheritable: none, permitted, effective: permitted, ambient: none, bounds: bounds() }
    }

    fn ambient(all: CapabilitySet) -> Has {
        Has { inheritable: all, ambient: all, ..Has::of(all) }
    }

    fn nothing_ever() -> Has {
        Has { bounds: CapabilitySet::empty(), ..Has::of(CapabilitySet::empty()) }
    }

    #[track_caller]
    fn is_that_of(self, pid: u32, who: &str) {
        self.is_in(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap(), who);
    }

    /// In what /proc says of a process.
    #[track_caller]
    fn is_in(self, status: &str, who: &str) {
        let all = [self.inheritable, self.permitted, self.effective, self.bounds, self.ambient];
        assert_eq!(fields(status, &CAPABILITIES), all.map(hex), "{who}");
    }
}

/// Two workers' master, wherever in its life: it, its keeper and its workers have these capabilities, and life goes on.
fn through_a_life(world: &World, app: App, command: impl Fn() -> Command, master_has: Has, worker_has: Has) {
    let mut master = Master::launch(world, &app.workers(2), command());
    let look = |master: &Master| {
        let mut keeper = String::new();
        // The keeper may just be replaced by one of the program that goes on.
        master.wait_status("two workers and a keeper", |now: &Status| {
            let of = now.master.keeper.map(|pid| fs::read_to_string(format!("/proc/{pid}/status")));
            keeper = of.and_then(Result::ok).unwrap_or_default();
            now.generations.iter().map(|one| one.workers.len()).sum::<usize>() == 2 && !keeper.is_empty()
        });
        master_has.is_that_of(master.pid(), "the master");
        Has { bounds: master_has.bounds, ..Has::nothing_ever() }.is_in(&keeper, "the keeper");
        assert_eq!(fields(&keeper, &["NoNewPrivs"]), ["1"]);
        master.serving().into_iter().for_each(|worker| worker_has.is_that_of(worker, "a worker"));
    };
    master.wait_ready();
    look(&master);
    master.upgrade();
    look(&master);
    let killed = master.serving()[0];
    kill([killed]);
    master.wait_status("respawned", |now| {
        let mut workers = now.generations.iter().flat_map(|one| &one.workers);
        workers.all(|worker| worker.pid.is_some_and(|pid| pid != killed)) && master.serving().len() == 2
    });
    look(&master);
    reexec(&master);
    look(&master);
    master.upgrade();
    look(&master);
    assert!(!state_of(master.app()).is_empty());
    master.kill();
    master.restart_by(command());
    master.wait_adopted();
    look(&master);
    master.upgrade();
    look(&master);
    master.stop();
}

fn this_program() -> Command {
    Command::new(REUSEPORTD)
}

#[test]
fn for_another_users_workers_it_keeps_what_it_uses() {
    world(&[Need::Root, Need::Bpf], |world| {
        let has = Has::of(own() & set(&USED));
        for (engine, mode) in [("ebpf", "plain"), ("ebpf", "sdk"), ("cbpf", "plain")] {
            let app = as_user(app(world, &format!("--mode {mode}"))).engine(engine);
            through_a_life(world, app, this_program, has, Has::nothing_ever());
        }
    });
}

#[test]
fn what_roots_workers_inherit_it_has_but_does_not_use() {
    world(&[Need::Root], |world| {
        let has = Has { effective: own() & set(&USED), ..Has::of(own()) };
        through_a_life(world, app(world, "--mode plain"), this_program, has, Has::of(own()));
    });
}

/// As in a container: the master could not look into workers that can do more than it.
#[test]
fn without_ptrace_it_uses_all_that_its_workers_have() {
    world(&[Need::Root], |world| {
        without(CapabilitySet::SYS_PTRACE);
        let has = Has::of(own() - CapabilitySet::SYS_PTRACE);
        through_a_life(world, app(world, "--mode plain"), this_program, has, has);
    });
}

/// Before there was CAP_BPF.
#[test]
fn an_administrator_keeps_being_one_where_nothing_less_helps() {
    world(&[Need::Root, Need::Bpf], |world| {
        without(CapabilitySet::BPF);
        let used = set(&USED) - CapabilitySet::BPF;
        let has = Has::of(own() & (used | CapabilitySet::SYS_ADMIN));
        let app = as_user(app(world, "--mode plain")).engine("ebpf");
        through_a_life(world, app, this_program, has, Has::nothing_ever());
    });
}

/// A copy of the program for everybody, in a world that is this user's.
fn installed(world: &World) -> PathBuf {
    chown(world.path(""), Some(UID), Some(UID)).unwrap();
    copy(world, REUSEPORTD.as_ref(), "reuseportd")
}

fn as_other(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.uid(UID).gid(UID);
    command
}

#[test]
fn an_ordinary_user_has_nothing_to_give_up() {
    world(&[Need::Root], |world| {
        let program = installed(world);
        let none = Has::of(CapabilitySet::empty());
        through_a_life(world, app(world, "--mode plain"), || as_other(&program), none, none);
    });
}

/// As by AmbientCapabilities= in a unit.
#[test]
fn ambient_capabilities_stay_and_reach_workers() {
    let names = |set: CapabilitySet| {
        set.iter_names().map(|(name, _)| format!("+{}", name.to_lowercase())).collect::<Vec<_>>().join(",")
    };
    world(&[Need::Root], |world| {
        let program = installed(world);
        for looks_into in [CapabilitySet::empty(), CapabilitySet::SYS_PTRACE] {
            let useless = CapabilitySet::SYS_NICE;
            let all = looks_into | useless | CapabilitySet::BPF | CapabilitySet::NET_BIND_SERVICE;
            let command = || {
                let mut command = Command::new("setpriv");
                command.args([format!("--reuid={UID}"), format!("--regid={UID}"), "--clear-groups".into()]);
                command
                    .args([format!("--inh-caps={}", names(all)), format!("--ambient-caps={}", names(all))]);
                command.arg(&program);
                command
            };
            let mut has = Has::ambient(all);
            if !looks_into.is_empty() {
                has.effective -= useless;
            }
            let app = app(world, "--mode plain").engine("ebpf");
            through_a_life(world, app, command, has, Has::ambient(all));
        }
    });
}

/// As by `setcap cap_bpf,cap_sys_nice+ep`.
#[test]
fn capabilities_of_the_file_are_not_for_workers() {
    world(&[Need::Root, Need::Bpf], |world| {
        let program = installed(world);
        let bits = (CapabilitySet::BPF | CapabilitySet::SYS_NICE).bits().to_le_bytes();
        // Revision 2, effective; permitted and inheritable, the lower and the upper half.
        let value = [&[1, 0, 0, 2], &bits[..4], &[0; 4], &bits[4..], &[0; 4]].concat();
        setxattr(&program, "security.capability", &value, XattrFlags::empty()).unwrap();
        let none = Has::of(CapabilitySet::empty());
        let app = app(world, "--mode plain").engine("ebpf");
        through_a_life(world, app, || as_other(&program), Has::of(CapabilitySet::BPF), none);
    });
}

#[test]
fn what_was_given_up_comes_back_with_a_reexec() {
    world(&[Need::Root], |world| {
        let plain = as_user(app(world, "--mode plain")).workers(2);
        let master = Master::start(world, &plain);
        let before = master.serving();
        let capable = plain.clone().app("capabilities = [\"CAP_SYS_NICE\"]");
        capable.write();
        let (code, receipt) = master.failing_upgrade();
        let reason = receipt.reason.unwrap();
        assert_eq!((code, receipt.outcome), (1, Outcome::Refused), "{reason}");
        for word in ["app.capabilities", "CAP_SYS_NICE", "gave up", "`reuseportd reexec`"] {
            assert!(reason.contains(word), "{word} in {reason}");
        }
        reexec(&master);
        let used = own() & set(&USED);
        let with = Has { permitted: used | CapabilitySet::SYS_NICE, ..Has::of(used) };
        with.is_that_of(master.pid(), "the master");
        assert_eq!(master.serving(), before);
        master.upgrade();
        let nice = CapabilitySet::SYS_NICE;
        let has = Has { bounds: nice, ..Has::ambient(nice) };
        master.serving().into_iter().for_each(|worker| has.is_that_of(worker, "a worker"));
        // No longer in the file, nor in force, but to be brought back.
        plain.write();
        master.upgrade();
        reexec(&master);
        with.is_that_of(master.pid(), "the master");
        assert_eq!(master.cli("rollback --wait").code, 0, "{}", master.log());
        master.serving().into_iter().for_each(|worker| has.is_that_of(worker, "a worker"));
        master.stop();
    });
}

#[test]
fn what_can_not_come_back_takes_a_new_start() {
    world(&[Need::Root], |world| {
        let mut command = Command::new("setpriv");
        command.arg("--no-new-privs").arg(REUSEPORTD);
        // uid 0 as well, but without any capability; without the line workers would have all.
        let powerless = app(world, "--mode plain").workers(1).app("user = 0");
        let mut master = Master::launch(world, &powerless, command);
        master.wait_ready();
        Has::nothing_ever().is_that_of(master.serving()[0], "a worker");
        let mut changed = powerless.clone();
        changed.app.clear();
        changed.write();
        for _ in 0..2 {
            let (code, receipt) = master.failing_upgrade();
            let reason = receipt.reason.unwrap();
            assert_eq!((code, receipt.outcome), (1, Outcome::Refused), "{reason}");
            for word in ["app.user", "CAP_SYS_ADMIN", "restart the service"] {
                assert!(reason.contains(word), "{word} in {reason}");
            }
            reexec(&master);
        }
        powerless.write();
        master.upgrade();
        master.stop();
    });
}

/// What only root could read, and directories of others, are no obstacle later either.
#[test]
fn what_root_may_reach_it_reaches_later_too() {
    world(&[Need::Root], |world| {
        let secret = world.path("secret");
        fs::create_dir(&secret).unwrap();
        fs::write(secret.join("environment"), "SECRET=1\n").unwrap();
        let close = |path: &Path, mode: u32| {
            chown(path, Some(OTHER), Some(OTHER)).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        close(&secret.join("environment"), 0o600);
        close(&secret, 0o700);
        let app = as_user(app(world, "--mode plain")).workers(1);
        let mut app = app.app(format!("environment_file = {:?}", secret.join("environment")));
        let master = Master::start(world, &app);
        close(&app.path, 0o600);
        master.upgrade();
        // A new low port, a new socket in that directory, more descriptors than the master was given itself.
        let free = 8081;
        app.listen.push(("more".into(), SocketAddr::from((Ipv4Addr::LOCALHOST, free))));
        let app = app.unix("file", &secret.join("app.sock"), "mode = \"0600\"");
        app.write();
        master.upgrade();
        let socket = fs::metadata(secret.join("app.sock")).unwrap();
        assert_eq!((socket.uid(), socket.mode() & 0o777), (UID, 0o600));
        assert_eq!(master.status().listeners.len(), 3, "{:#?}", master.status());
        reexec(&master);
        master.upgrade();
        master.stop();
        assert!(!secret.join("app.sock").exists());
    });
}

/// What it has given up it is told once, to those who look.
#[test]
fn the_log_names_what_was_given_up() {
    world(&[Need::Root], |world| {
        let app = as_user(app(world, "--mode plain")).workers(1);
        let mut command = this_program();
        command.args(["--log-level", "debug"]);
        let mut master = Master::launch(world, &app, command);
        master.wait_ready();
        let log = master.log();
        let told: Vec<_> = log.lines().filter(|line| line.contains("event=\"privileges\"")).collect();
        assert!(matches!(told[..], [line] if line.contains("CAP_SYS_MODULE")), "{told:#?}");
        master.stop();
    });
}
