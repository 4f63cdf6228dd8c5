//! `reuseportd doctor`, with each fault it knows made on purpose.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::master::REUSEPORTD;
use crate::support::process::Running;
use crate::support::world::{Need, World, sysctl, tool, world};

const EVERYTHING: [Need; 2] = [Need::Root, Need::Bpf];
const WELL: [&str; 5] = [
    "kernel",
    "net.core.somaxconn",
    "net.ipv4.tcp_max_syn_backlog",
    "nofile",
    "net.ipv4.tcp_abort_on_overflow",
];
const TRIED: [&str; 6] = [
    "ebpf.steering",
    "ebpf.migration",
    "kernel.wake_up",
    "cbpf.slot",
    "cbpf.order",
    "net.ipv4.tcp_migrate_req",
];

/// What the doctor said.
pub(crate) struct Told {
    code: i32,
    pub(crate) report: Value,
}

/// A script that ends as the doctor, for a service with this config.
fn doctor_after(world: &World, before: &str) -> Told {
    examine(world, Path::new(REUSEPORTD), before)
}

/// `before` is a prefix of the command line or commands and `&&`.
fn examine(world: &World, program: &Path, before: &str) -> Told {
    let config = world.path("app.toml");
    let script = format!("{before} {} doctor --json --config {}", program.display(), config.display());
    let mut command = Command::new("sh");
    command.args(["-c", &script]);
    told(command)
}

pub(crate) fn told(command: Command) -> Told {
    let done = Running::start(command).finish(PATIENCE);
    let report = serde_json::from_str(&done.stdout);
    Told { code: done.code, report: report.unwrap_or_else(|error| panic!("{error}: {done:#?}")) }
}

impl Told {
    fn finding(&self, check: &str) -> &Value {
        let mut findings = self.report["findings"].as_array().unwrap().iter();
        findings.find(|one| one["check"] == check).unwrap_or_else(|| panic!("no {check}: {:#}", self.report))
    }

    /// Demands that a check has this level and, unless all is well, says what is lost and what mends it.
    pub(crate) fn expect(&self, check: &str, level: &str) -> &Value {
        let finding = self.finding(check);
        assert_eq!(finding["level"], level, "{finding:#}");
        for key in ["lost", "remedy"] {
            assert_eq!(finding[key].is_string(), level != "ok", "{finding:#}");
        }
        finding
    }

    pub(crate) fn expect_code(&self, code: i32) {
        assert_eq!(self.code, code, "{:#}", self.report);
        assert_eq!(self.report["promise_kept"], code == 0);
    }
}

/// A namespace in which the network is as it should be, and a config.
fn in_good_order(world: &World) -> App {
    for (name, value) in [
        ("net.core.somaxconn", "4096"),
        ("net.ipv4.tcp_max_syn_backlog", "4096"),
        ("net.ipv4.tcp_migrate_req", "1"),
        ("net.ipv4.tcp_abort_on_overflow", "0"),
    ] {
        sysctl(name, value);
    }
    let app = App::test_worker(world, "").workers(2);
    app.write();
    app
}

/// A program as an ordinary user can run it.
fn copy(world: &World, from: impl AsRef<Path>, name: &str, mode: u32) -> PathBuf {
    let to = world.path(name);
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(from, &to).unwrap();
    fs::set_permissions(&to, fs::Permissions::from_mode(mode)).unwrap();
    to
}

const ORDINARY: &str =
    "setpriv --reuid 61234 --regid 61234 --clear-groups --inh-caps=-all --bounding-set=-all";

#[test]
fn all_is_well_on_a_good_machine() {
    world(&EVERYTHING, |world| {
        in_good_order(world);
        let told = doctor_after(world, "");
        told.expect_code(0);
        WELL.iter().chain(&TRIED).for_each(|check| {
            told.expect(check, "ok");
        });
        assert_eq!(told.report["engine"], "ebpf");
        for guarantee in told.report["guarantees"].as_array().unwrap() {
            assert_eq!(
                (&guarantee["upgrade"], &guarantee["worker_killed"]),
                (&"0".into(), &"0 beyond what it held".into())
            );
        }
        let mut command = Command::new(REUSEPORTD);
        command.arg("doctor");
        let text = Running::start(command).finish(PATIENCE);
        assert_eq!(text.code, 0, "{text:#?}");
        assert!(
            text.stdout.contains("engine: ebpf") && text.stdout.contains("the promise can be kept"),
            "{text:#?}"
        );
    });
}

#[test]
fn settings_of_the_network_are_held_against_the_config() {
    world(&EVERYTHING, |world| {
        in_good_order(world);
        for (name, value, mended, level) in [
            ("net.core.somaxconn", "128", "4096", "warning"),
            ("net.ipv4.tcp_max_syn_backlog", "256", "4096", "note"),
            ("net.ipv4.tcp_abort_on_overflow", "1", "0", "warning"),
            ("net.ipv4.tcp_migrate_req", "0", "1", "note"),
        ] {
            sysctl(name, value);
            let told = doctor_after(world, "");
            told.expect_code(0);
            let finding = told.expect(name, level);
            assert!(finding["found"].as_str().unwrap().contains(value), "{finding:#}");
            assert_eq!(finding["remedy"], format!("sysctl -w {name}={mended}"));
            tool(finding["remedy"].as_str().unwrap());
            doctor_after(world, "").expect(name, "ok");
        }
        sysctl("net.ipv4.tcp_max_syn_backlog", "256");
        sysctl("net.ipv4.tcp_syncookies", "0");
        doctor_after(world, "").expect("net.ipv4.tcp_max_syn_backlog", "warning");
    });
}

#[test]
fn missing_capabilities_cost_the_engine_and_are_named() {
    world(&EVERYTHING, |world| {
        let app = in_good_order(world);
        let setcap = |finding: &Value| {
            let remedy = finding["remedy"].as_str().unwrap();
            assert!(remedy.contains("setcap cap_bpf,cap_sys_ptrace+ep /"), "{finding:#}");
        };
        let program = copy(world, REUSEPORTD, "reuseportd", 0o755);
        let ordinary = "setpriv --reuid 61234 --regid 61234 --clear-groups --inh-caps=-all";
        setcap(examine(world, &program, ordinary).expect("cap_bpf", "warning"));
        // What is out of bounds no file can give.
        let without = |names: &str| doctor_after(world, &format!("setpriv --bounding-set={names}"));
        let told = without("-sys_ptrace");
        told.expect("cap_sys_ptrace", "note");
        told.expect("pidfd_getfd", "ok");
        without("-net_admin").expect("cap_net_admin", "note");
        let told = without("-bpf,-sys_admin");
        told.expect_code(0);
        let finding = told.expect("cap_bpf", "warning");
        assert!(finding["remedy"].as_str().unwrap().contains("--cap-add BPF"), "{finding:#}");
        told.expect("ebpf.steering", "note");
        told.expect("kernel.wake_up", "ok");
        assert_eq!(told.report["engine"], "cbpf");
        sysctl("net.ipv4.tcp_migrate_req", "0");
        let told = without("-bpf,-sys_admin");
        told.expect("net.ipv4.tcp_migrate_req", "warning");
        assert_eq!(told.report["guarantees"][1]["worker_killed"], "its queue, counted");
        assert_eq!(told.report["guarantees"][0]["worker_killed"], "0 beyond what it held");

        app.clone().engine("ebpf").write();
        let told = without("-bpf,-sys_admin");
        told.expect_code(1);
        told.expect("cap_bpf", "problem");
        told.expect("engine", "problem");
        app.engine("none").write();
        let told = doctor_after(world, "");
        told.expect_code(1);
        told.expect("engine", "problem");
    });
}

#[test]
fn a_low_port_needs_its_capability() {
    world(&EVERYTHING, |world| {
        let mut app = in_good_order(world);
        app.listen = vec![("default".into(), "127.0.0.1:80".parse().unwrap())];
        app.write();
        doctor_after(world, "").expect("cap_net_bind_service", "ok");
        let told = doctor_after(world, "setpriv --bounding-set=-net_bind_service");
        told.expect_code(1);
        let remedy = told.expect("cap_net_bind_service", "problem")["remedy"].as_str().unwrap().to_owned();
        tool(&remedy);
        doctor_after(world, "setpriv --bounding-set=-net_bind_service").expect_code(0);
    });
}

#[test]
fn an_ordinary_user_learns_what_it_can_have() {
    world(&[Need::Root], |world| {
        in_good_order(world);
        let program = copy(world, REUSEPORTD, "reuseportd", 0o755);
        let told = examine(world, &program, ORDINARY);
        told.expect_code(0);
        assert_eq!(told.report["engine"], "cbpf");
        for (check, level) in [
            ("cap_bpf", "warning"),
            ("cap_sys_ptrace", "note"),
            ("pidfd_getfd", "ok"),
            ("cbpf.slot", "ok"),
            ("cbpf.order", "ok"),
            ("ebpf.steering", "note"),
        ] {
            told.expect(check, level);
        }
    });
}

#[test]
fn a_child_that_keeps_its_descriptors_is_a_problem() {
    world(&[Need::Root], |world| {
        in_good_order(world);
        let program = copy(world, REUSEPORTD, "reuseportd", 0o755);
        // A program that may be run and not read is not dumpable: as out of reach as under a strict security module.
        let cat = copy(world, "/bin/cat", "bin/cat", 0o711);
        let path = format!("{ORDINARY} env PATH={}", cat.parent().unwrap().display());
        let told = examine(world, &program, &path);
        told.expect_code(1);
        told.expect("pidfd_getfd", "problem");
        assert_eq!(told.report["guarantees"][1]["upgrade"], "can't be run here");
        let told = examine(world, &program, "PATH=/nowhere");
        told.expect("pidfd_getfd", "warning");
        told.expect_code(0);
    });
}

#[test]
fn too_few_descriptors_are_a_problem_and_no_panic() {
    world(&EVERYTHING, |world| {
        in_good_order(world);
        let told = doctor_after(world, "ulimit -n 40 &&");
        told.expect_code(1);
        let finding = told.expect("nofile", "problem");
        // 64 + 2 generations * 2 workers * (4 + 1 listener)
        assert!(finding["remedy"].as_str().unwrap().starts_with("ulimit -n 84 "), "{finding:#}");
        TRIED.iter().for_each(|check| {
            told.expect(check, "ok");
        });
        let told = doctor_after(world, "ulimit -n 5 &&");
        told.expect_code(1);
        told.expect("cbpf.slot", "warning");
        doctor_after(world, "ulimit -n 84 &&").expect("nofile", "ok");
        // Only the hard limit counts: the master raises the other.
        doctor_after(world, "ulimit -Sn 5 &&").expect("nofile", "ok");
    });
}

#[test]
fn what_cannot_be_tried_is_said() {
    world(&EVERYTHING, |world| {
        in_good_order(world);
        tool("ip link set lo down");
        let told = doctor_after(world, "");
        for check in ["ebpf.steering", "ebpf.migration"] {
            let finding = told.expect(check, "warning");
            assert!(finding["found"].as_str().unwrap().contains("not tested"), "{finding:#}");
            assert!(finding["remedy"].as_str().unwrap().contains("ip link set lo up"), "{finding:#}");
        }
        told.expect("cbpf.slot", "note");
        told.expect("cbpf.order", "ok");
        told.expect("net.ipv4.tcp_migrate_req", "note");
    });
}

#[test]
fn faults_of_the_kernel_are_known() {
    world(&EVERYTHING, |world| {
        in_good_order(world);
        let with = |place: &str, text: &str| {
            let fake = world.path("fake");
            fs::write(&fake, text).unwrap();
            let mount = format!("mount --bind {} {place}", fake.display());
            doctor_after(world, &format!("unshare --mount sh -c '{mount} && exec \"$@\"' -"))
        };
        let release = "/proc/sys/kernel/osrelease";
        let told = with(release, "5.4.0-150-generic\n");
        told.expect_code(1);
        told.expect("kernel", "problem");
        let told = with(release, "5.10.0-32-amd64\n");
        told.expect_code(0);
        told.expect("kernel", "warning");
        with(release, "5.14.0-427.el9\n").expect("kernel", "ok");

        let symbols = "/proc/kallsyms";
        let unfixed = "0000000000000000 T reuseport_attach_prog\n";
        with(symbols, unfixed).expect("kernel.cbpf_replace", "note");
        with(symbols, "").expect("kernel.cbpf_replace", "note");
        let fixed = format!("{unfixed}0000000000000000 t sk_reuseport_prog_free_rcu\n");
        with(symbols, &fixed).expect("kernel.cbpf_replace", "ok");
        App::test_worker(world, "").engine("cbpf").write();
        with(symbols, unfixed).expect("kernel.cbpf_replace", "warning");

        let open = with("/proc/sys/kernel/unprivileged_bpf_disabled", "0\n");
        open.expect("kernel.unprivileged_bpf_disabled", "note");
        let without = "unshare --mount sh -c 'umount -a -t cgroup2 && exec \"$@\"' -";
        doctor_after(world, without).expect("cgroup2", "note");
    });
}

#[test]
fn an_invalid_config_is_code_2_and_a_socket_wrong_usage() {
    world(&[], |world| {
        App::test_worker(world, "").write_invalid();
        let config = world.path("app.toml");
        for option in [OsStr::new("--config"), OsStr::new("--socket")] {
            let mut command = Command::new(REUSEPORTD);
            command.arg("doctor").arg(option).arg(&config);
            let done = Running::start(command).finish(PATIENCE);
            assert_eq!((done.code, done.stdout.as_str()), (2, ""), "{done:#?}");
            assert!(!done.stderr.is_empty());
        }
    });
}
