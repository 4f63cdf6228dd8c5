//! The master as PID 1: it reaps what loses its parent, is signalled as an engine does it, and finds its place in
//! containers of every kind. The engine's own defaults for capabilities and seccomp are what is tested.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use reuseportd_bench::Spec;
use reuseportd_wire::status::{Engine, MasterState, Outcome};
use rustix::process::Signal;
use serde_json::Value;

use crate::doctor::told;
use crate::support::app::{App, test_worker};
use crate::support::container::{Around, Container, FirstProcess, podman_done, run};
use crate::support::load::{Load, slow_accepts};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{Running, kill, processes_of, wait_gone};
use crate::support::world::{World, example, repository, world};
use crate::support::{PATIENCE, rounds};

/// Orphans of each worker: they end when the world's `orphans` is opened for writing, and not by SIGTERM.
const ORPHANS: usize = 200;

/// One worker that has started children who have started children, and left them alone.
fn with_orphans(world: &World) -> App {
    let pipe = world.path("orphans");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, 0o666.into()).unwrap();
    let script = format!(
        "trap '' TERM; n=0; while [ $n -lt {ORPHANS} ]; do (read line <{} &); n=$((n + 1)); done; exec {}",
        pipe.display(),
        test_worker("--mode plain").join(" ")
    );
    App::new(world, ["sh", "-c", &script]).workers(1)
}

/// Waits until it has one living worker, so many other living children, and nobody to be reaped; the worker.
fn wait_family(first: &FirstProcess<'_>, what: &str, orphans: usize) -> u32 {
    let children = first.wait_children(what, |children| {
        children.len() == orphans + 1 && children.iter().all(|child| !child.is_zombie)
    });
    children.iter().find(|child| child.name == "test_worker").expect("a worker").pid
}

fn orphans_are_reaped(around: Around) {
    world(around.needs(), |world| {
        let mut app = with_orphans(world);
        let first = around.start(world, &app);
        let worker = wait_family(&first, "given the orphans", ORPHANS);

        // Its orphans ignore SIGTERM, so that for a second the worker has to stay: a zombie that is not to be reaped.
        let before = (Instant::now(), first.ticks());
        kill([worker]);
        first.wait_children("waiting for the rest", |children| {
            children.iter().any(|child| child.pid == worker && child.is_zombie)
        });
        wait_family(&first, "given those of the next worker alone", ORPHANS);
        let took = before.0.elapsed();
        assert!(took.as_millis() >= 1000, "the remains were given no time");
        // A hundred of them make a second.
        let ticks = first.ticks() - before.1;
        assert!(u128::from(ticks) * 1000 < 60 * took.as_millis(), "it spins: {ticks} ticks in {took:?}");
        assert!(
            first.master.log().contains("was killed by SIGKILL"),
            "how it ended is not known:\n{}",
            first.master.log()
        );

        // All at once.
        drop(fs::File::create(world.path("orphans")).unwrap());
        wait_family(&first, "rid of the orphans", 0);

        // Its own children end as they did before.
        app.command = test_worker("--mode plain --fail exit-before-ready");
        app.write();
        let (_, receipt) = first.master.failing_upgrade();
        assert!(receipt.reason.as_deref().unwrap().contains("status 3"), "{receipt:#?}");
        app.command = test_worker("--mode sdk");
        app.write();
        first.master.upgrade();
        wait_family(&first, "rid of the old generation", 0);
        first.master.stop();
    });
}

#[test]
fn orphans_are_reaped_in_namespaces() {
    orphans_are_reaped(Around::Namespaces);
}

#[test]
fn orphans_are_reaped_in_an_engine() {
    orphans_are_reaped(Around::Engine);
}

fn upgrades_lose_nothing(around: Around, mode: &str, engine: Engine) {
    world(around.needs(), |world| {
        let app = App::test_worker(world, &format!("--mode {mode} --accept-delay 5"));
        let first = around.start(world, &app);
        let listener = &first.master.status().listeners[0];
        assert_eq!(listener.engine, engine, "{listener:#?}");
        let load = Load::start(slow_accepts(world));
        let upgrades = rounds(3, 20);
        for generation in 2..=upgrades + 1 {
            first.master.hup();
            load.answered_by(generation);
        }
        load.end_lossless();
        wait_no_zombies(&first);
        first.master.stop();
        control_loses(around, world, slow_accepts(world));
    });
}

fn wait_no_zombies(first: &FirstProcess<'_>) {
    first.wait_children("without zombies", |children| children.iter().all(|child| !child.is_zombie));
}

/// The same load, nothing that steers, and workers that drop what waits.
fn control_loses(around: Around, world: &World, spec: Spec) {
    let app = App::test_worker(world, "--mode naive --accept-delay 5").engine("none");
    let app = app.upgrade("stop_when = \"drained\"").upgrade("settle_timeout = \"100ms\"");
    let first = around.start(world, &app.upgrade("drain_timeout = \"1s\""));
    let load = Load::start(spec);
    for _ in 0..2 {
        first.master.hup();
        load.answered(100);
    }
    let report = load.end();
    assert!(report.lost() > 0, "the load shows nothing, the naive control loses nothing either: {report}");
    first.master.stop();
}

#[test]
fn upgrades_lose_nothing_in_namespaces() {
    upgrades_lose_nothing(Around::Namespaces, "plain", Engine::Ebpf);
}

#[test]
fn upgrades_lose_nothing_in_an_engine() {
    upgrades_lose_nothing(Around::Engine, "plain", Engine::Cbpf);
}

#[test]
fn upgrades_lose_nothing_in_an_engine_with_bpf() {
    upgrades_lose_nothing(Around::EngineWithBpf, "sdk", Engine::Ebpf);
}

fn signals_have_their_meaning(around: Around) {
    world(around.needs(), |world| {
        let app = App::test_worker(world, "--mode sdk").upgrade("drain_timeout = \"1h\"");
        let mut first = around.start(world, &app);
        let before = processes_of(&world.app);
        // Those without a meaning are for nobody. Passed on, each would end a worker.
        for signal in [Signal::ALARM, Signal::VTALARM, Signal::USR1, Signal::XCPU, Signal::PROF] {
            first.master.signal(signal);
        }
        first.master.upgrade();
        assert!(!first.master.log().contains("asked=false"), "{}", first.master.log());
        let after = processes_of(&world.app);
        assert!(
            before.len() == after.len() && after.iter().all(|process| process.generation == 2),
            "{after:?}"
        );

        let mut client = TcpStream::connect(world.address).unwrap();
        client.write_all(b"half a line").unwrap();
        first.master.wait_status("accepted", |status| status.generations[0].connections == Some(1));
        first.master.signal(Signal::TERM);
        first.master.wait_status("stopping", |status| status.state == MasterState::Stopping);
        assert_eq!(first.master.wait_end(Duration::from_millis(300)), None, "not waited for");
        first.master.signal(Signal::TERM);
        first.master.ended(0);
    });
}

#[test]
fn signals_have_their_meaning_in_namespaces() {
    signals_have_their_meaning(Around::Namespaces);
}

#[test]
fn signals_have_their_meaning_in_an_engine() {
    signals_have_their_meaning(Around::Engine);
}

/// Everything in the namespace dies with PID 1. What it has left in a directory that outlives it is nobody's.
fn a_killed_one_starts_again(around: Around) {
    world(around.needs(), |world| {
        let app = App::test_worker(world, "--mode sdk");
        let killed = around.start(world, &app);
        let workers = processes_of(&world.app);
        kill([killed.pid]);
        workers.iter().for_each(|worker| wait_gone(worker.pid, PATIENCE));
        assert!(world.path("run").exists());
        let mut first = around.start(world, &app);
        let status = first.master.status();
        assert!(!status.master.adopted && status.active_generation == Some(1), "{status:#?}");
        first.master.upgrade();
        first.master.signal(Signal::TERM);
        assert_eq!(first.master.wait_end(PATIENCE), Some(0), "{}", first.master.log());
        assert_eq!(processes_of(&world.app), []);
    });
}

#[test]
fn a_killed_one_starts_again_in_namespaces() {
    a_killed_one_starts_again(Around::Namespaces);
}

#[test]
fn a_killed_one_starts_again_in_an_engine() {
    a_killed_one_starts_again(Around::Engine);
}

fn a_reexec_stays_pid_1(around: Around) {
    world(around.needs(), |world| {
        let app = with_orphans(world);
        let first = around.start(world, &app);
        let worker = wait_family(&first, "given the orphans", ORPHANS);
        let load = Load::start(slow_accepts(world));
        first.master.signal(Signal::USR2);
        let status = first.master.wait_status("another image", |status| status.master.reexecs == 1);
        assert_eq!(status.master.pid, 1);
        load.answered(100);
        load.end_lossless();
        assert_eq!(wait_family(&first, "as before", ORPHANS), worker);
        drop(fs::File::create(world.path("orphans")).unwrap());
        wait_family(&first, "rid of the orphans", 0);
        first.master.stop();
    });
}

#[test]
fn a_reexec_stays_pid_1_in_namespaces() {
    a_reexec_stays_pid_1(Around::Namespaces);
}

#[test]
fn a_reexec_stays_pid_1_in_an_engine() {
    a_reexec_stays_pid_1(Around::Engine);
}

/// The README's Containerfile, with the difficult worker as the service.
fn build(world: &World) -> String {
    let readme = fs::read_to_string(repository("README.md")).unwrap();
    let file = readme.split_once("```dockerfile\n").expect("a Containerfile").1.split_once("```").unwrap().0;
    let context = world.path("context");
    fs::create_dir(&context).unwrap();
    fs::write(context.join("Containerfile"), file).unwrap();
    fs::copy(REUSEPORTD, context.join("reuseportd")).unwrap();
    fs::copy(example("test_worker"), context.join("web")).unwrap();
    let config = format!(
        "[app]\ncommand = [\"/srv/web/bin/web\", \"--mode\", \"plain\", \"--accept-delay\", \"5\"]\nworkers = 4\n\
         [[listen]]\naddress = \"{}\"\n",
        world.address
    );
    fs::write(context.join("web.toml"), config).unwrap();
    let image = format!("localhost/{}", world.app);
    podman_done(&["build", "--quiet", "--pull=never", "--tag", &image, context.to_str().unwrap()]);
    image
}

/// Waits until this generation serves in the container, and nothing goes on.
fn wait_steady(container: &Container, generation: u32) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let done = container.exec("reuseportd status --json --config /etc/reuseportd/web.toml");
        let status: Value = serde_json::from_str(&done.stdout).unwrap_or_default();
        if status["state"] == "steady" && status["active_generation"] == generation {
            return status;
        }
        assert!(Instant::now() < deadline, "never steady: {done:#?}\n{}", container.log());
    }
}

#[test]
fn the_image_of_the_readme() {
    world(Around::Engine.needs(), |world| {
        let image = build(world);
        for options in [&[][..], &["--read-only"], &["--user=12345:0", "--cap-drop=all", "--read-only"]] {
            let container = Container::start(world, &[options, &[&image]].concat());
            let status = wait_steady(&container, 1);
            assert_eq!(status["master"]["pid"], 1);
            assert_eq!(status["listeners"][0]["engine"], "cbpf");
            assert_eq!(status["listeners"][0]["engine_reason"], "auto: no ebpf (CAP_BPF is missing)");
            let load = Load::start(slow_accepts(world));
            container.signal("HUP");
            wait_steady(&container, 2);
            load.answered_by(2);
            let upgrade = "reuseportd upgrade --wait=drained --json --config /etc/reuseportd/web.toml";
            let done = container.exec(upgrade);
            let receipt: Value = serde_json::from_str(&done.stdout).unwrap();
            assert_eq!((done.code, &receipt["outcome"]), (0, &"completed".into()), "{done:#?}");
            load.answered_by(3);
            load.end_lossless();
            assert_eq!(container.stop(), "0", "{}", container.log());
        }
    });
}

#[test]
fn without_a_place_to_write_the_remedy_is_told() {
    world(Around::Engine.needs(), |world| {
        let config = world.path("app.toml");
        let mut app = App::test_worker(world, "");
        let listen = format!("[[listen]]\naddress = \"{}\"\n", world.address);
        app.verbatim = Some(format!("[app]\nname = \"web\"\ncommand = {:?}\n{listen}", app.command));
        app.write();
        let start = |options: &[&str]| {
            let strict = ["--read-only", "--read-only-tmpfs=false"];
            let command = [REUSEPORTD, "--log-format", "text", "--config", config.to_str().unwrap()];
            Running::start(run(world, &[&strict, options].concat(), &command)).finish(PATIENCE)
        };
        let tmpfs = "mount a tmpfs there (podman, docker: --tmpfs)";
        for (options, wanted) in [
            (&[][..], ["/run/reuseportd/web: Read-only file system", tmpfs]),
            (&["--user=12345"], ["/tmp/reuseportd-12345/web: Read-only file system", tmpfs]),
            (&["--env=RUNTIME_DIRECTORY=/etc"], ["cannot lock /etc/control.sock.lock: Read-only", tmpfs]),
            (
                &["--user=12345", "--env=XDG_RUNTIME_DIR=/run", "--tmpfs=/run:mode=755"],
                ["/run/reuseportd/web: Permission denied", "a path that this user may write to"],
            ),
        ] {
            let done = start(options);
            assert_eq!(done.code, 1, "{options:?}: {done:#?}");
            for wanted in wanted.iter().chain(&["control.socket"]) {
                assert!(done.stderr.contains(wanted), "{options:?}: no {wanted:?}: {done:#?}");
            }
        }
        // With the remedy it runs.
        for options in [&["--tmpfs=/run"][..], &["--user=12345", "--tmpfs=/tmp"]] {
            let strict = ["--read-only", "--read-only-tmpfs=false"];
            let command = run(world, &[&strict, options].concat(), &[REUSEPORTD]);
            let mut master = Master::launch(world, &app, command);
            master.wait_ready();
            master.stop();
        }
    });
}

/// Docker's profile in what matters here: pidfd_getfd goes with CAP_SYS_PTRACE, which is not there by default.
fn without_getfd(world: &World) -> String {
    let text = fs::read_to_string("/usr/share/containers/seccomp.json").expect("podman's own profile");
    let mut profile: Value = serde_json::from_str(&text).unwrap();
    let rules = profile["syscalls"].as_array_mut().unwrap();
    for names in rules.iter_mut().map(|rule| rule["names"].as_array_mut().unwrap()) {
        names.retain(|name| name != "pidfd_getfd");
    }
    let caps = serde_json::json!({ "caps": ["CAP_SYS_PTRACE"] });
    rules.extend([
        serde_json::json!({ "names": ["pidfd_getfd"], "action": "SCMP_ACT_ALLOW", "includes": caps }),
        serde_json::json!({ "names": ["pidfd_getfd"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "excludes": caps }),
    ]);
    let path = world.path("seccomp.json");
    fs::write(&path, profile.to_string()).unwrap();
    format!("--security-opt=seccomp={}", path.display())
}

#[test]
fn the_doctor_says_what_a_container_has() {
    world(Around::EngineWithBpf.needs(), |world| {
        App::test_worker(world, "").write();
        let config = world.path("app.toml");
        let examine = |options: &[&str]| {
            told(run(world, options, &[REUSEPORTD, "doctor", "--json", "--config", config.to_str().unwrap()]))
        };
        let remedy = |finding: &Value, wanted: &str| {
            let remedy = finding["remedy"].as_str().unwrap();
            assert!(remedy.contains(wanted), "no {wanted:?}: {finding:#}");
        };
        for options in [&[][..], &["--user=12345"], &["--cap-drop=all"]] {
            let told = examine(options);
            told.expect_code(0);
            assert_eq!(told.report["engine"], "cbpf");
            assert_eq!(told.report["guarantees"][1]["upgrade"], "0");
            remedy(told.expect("cap_bpf", "warning"), "start the container with --cap-add BPF");
            remedy(told.expect("cap_sys_ptrace", "note"), "--cap-add SYS_PTRACE");
            remedy(told.expect("net.ipv4.tcp_migrate_req", "warning"), "--sysctl net.ipv4.tcp_migrate_req=1");
            told.expect("pidfd_getfd", "ok");
        }
        examine(&["--sysctl=net.ipv4.tcp_migrate_req=1"]).expect("net.ipv4.tcp_migrate_req", "ok");

        // The capability without the call.
        let told = examine(&["--cap-add=BPF"]);
        told.expect_code(0);
        told.expect("cap_bpf", "ok");
        remedy(told.expect("engine", "warning"), "the seccomp profile of the container");
        remedy(told.expect("ebpf.steering", "note"), "the seccomp profile of the container");

        let told = examine(&["--cap-add=BPF", "--security-opt=seccomp=unconfined"]);
        told.expect_code(0);
        assert_eq!(told.report["engine"], "ebpf");

        let profile = without_getfd(world);
        let told = examine(&[&profile]);
        told.expect_code(1);
        remedy(told.expect("pidfd_getfd", "problem"), "--cap-add SYS_PTRACE");
        assert_eq!(told.report["guarantees"][1]["upgrade"], "can't be run here");
        assert_eq!(told.report["guarantees"][0]["upgrade"], "0");
        for options in [&[][..], &["--user=12345"]] {
            let told = examine(&[&[profile.as_str(), "--cap-add=SYS_PTRACE"], options].concat());
            told.expect_code(0);
            told.expect("pidfd_getfd", "ok");
        }
        does_as_the_doctor_said(world, &profile);
    });
}

/// Without pidfd_getfd unmodified workers can't be run, and handover workers can.
fn does_as_the_doctor_said(world: &World, profile: &str) {
    let app = App::test_worker(world, "--mode plain");
    let mut master = Master::launch(world, &app, run(world, &[profile], &[REUSEPORTD]));
    assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
    assert!(master.log().contains("pidfd_getfd"), "{}", master.log());
    let app = App::test_worker(world, "--mode sdk");
    let mut master = Master::launch(world, &app, run(world, &[profile], &[REUSEPORTD]));
    master.wait_ready();
    assert_eq!(master.upgrade().outcome, Outcome::Completed);
    master.stop();
}
