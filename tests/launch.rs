//! What a worker finds when it starts, and what is left when it has ended.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::support::app::{App, test_worker};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{kill, processes_of};
use crate::support::world::{World, world};

/// A worker that first writes down its surroundings, and then becomes the difficult worker.
fn reporting(world: &World, options: &str) -> App {
    let script = world.path("report.sh");
    let directory = world.path("");
    let text = format!(
        "#!/bin/sh\ncd_was=$(pwd)\ncd {directory} || exit 9\n\
         (ls -l /proc/$$/fd > fds)\ncat /proc/self/status > status\ntr '\\0' '\\n' < /proc/$$/environ > environ\n\
         cat /proc/$$/limits > limits\ncat /proc/$$/stat > stat\numask > umask\necho \"$cd_was\" > cwd\n\
         echo \"$@\" > arguments\nexec \"$@\"\n",
        directory = directory.display(),
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = vec![script.to_str().unwrap().to_owned()];
    command.extend(test_worker(options));
    App::new(world, command).workers(1)
}

/// A master that has inherited all the untidiness there is.
fn untidy(world: &World) -> Command {
    let mut command = Command::new("sh");
    let tidy_not = "exec 8</dev/null 9</dev/null; trap '' USR1 INT PIPE; umask 077; exec \"$0\" \"$@\"";
    command.args(["-c", tidy_not, REUSEPORTD]).current_dir(world.path(""));
    for (name, value) in [
        ("REUSEPORTD_CHANNEL", "77"),
        ("LISTEN_FDS", "1"),
        ("LISTEN_PID", "1"),
        ("WATCHDOG_USEC", "1000000"),
        ("KEPT", "as it was"),
    ] {
        command.env(name, value);
    }
    command
}

/// The value of a line `Name:<tab>value`, as `/proc` has it.
fn field<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name} in {text}")).trim()
}

#[test]
fn surroundings_are_clean() {
    world(&[], |world| {
        let app = reporting(world, "--mode plain");
        let mut master = Master::launch(world, &app, untidy(world));
        master.wait_ready();
        let fds = world.read("fds");
        // The shell holds its own script open besides.
        let own = fds.lines().filter(|line| line.contains(" -> ") && !line.ends_with("report.sh"));
        let numbers: Vec<&str> =
            own.filter_map(|line| line.split(" -> ").next()?.rsplit(' ').next()).collect();
        assert_eq!(numbers, ["0", "1", "2", "3"], "{fds}");

        let status = world.read("status");
        assert_eq!(field(&status, "SigBlk:"), "0000000000000000", "blocked signals");
        assert_eq!(field(&status, "SigIgn:"), "0000000000000000", "ignored signals");
        assert_eq!(field(&status, "NoNewPrivs:"), "1");
        let stat = world.read("stat");
        let stat: Vec<&str> = stat.split(' ').collect();
        assert_eq!(stat[0], stat[4], "a process group of its own");
        assert_eq!(world.read("umask").trim(), "0077", "the master's, as nothing else is asked for");

        let environ = world.read("environ");
        let variable = |name: &str| environ.lines().find_map(|line| line.strip_prefix(&format!("{name}=")));
        assert_eq!(variable("REUSEPORTD_APP"), Some(&*world.app));
        assert_eq!(variable("REUSEPORTD_GENERATION"), Some("1"));
        assert_eq!(variable("REUSEPORTD_SEAT"), Some("0"));
        assert_eq!(variable("REUSEPORTD_WORKERS"), Some("1"));
        assert_eq!(variable("REUSEPORTD_LISTEN"), Some(&*format!("default=tcp:{}", world.address)));
        assert_eq!(variable("REUSEPORTD_CHANNEL"), Some("3"));
        assert_eq!(variable("KEPT"), Some("as it was"));
        assert!(
            variable("NOTIFY_SOCKET").is_some_and(|path| path != master.upstream.path().to_str().unwrap())
        );
        for leaked in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID"] {
            assert_eq!(variable(leaked), None, "{leaked} leaks");
        }
        master.stop();
    });
}

#[test]
fn surroundings_are_as_configured() {
    world(&[], |world| {
        fs::write(world.path("env"), "# a comment\nFROM_FILE=file\nBOTH='file'\n").unwrap();
        let placeholders =
            "--mode plain --print {generation}/{seat}/{address.default}/{host.default}/{port.default}";
        let app = reporting(world, placeholders)
            .app("environment = { FROM_CONFIG = \"config\", BOTH = \"config\" }")
            .app(format!("environment_file = {:?}", world.path("env")))
            .app("working_directory = \"/usr\"")
            .app("umask = \"027\"")
            .app("limits = { nofile = 777, core = 0 }")
            .app("no_new_privileges = false");
        let master = Master::start(world, &app);
        let environ = world.read("environ");
        for line in ["FROM_FILE=file", "FROM_CONFIG=config"] {
            assert!(environ.lines().any(|found| found == line), "{line} in {environ}");
        }
        assert_eq!(environ.lines().filter(|line| line.starts_with("BOTH=")).count(), 1);
        assert_eq!(world.read("cwd").trim(), "/usr");
        assert_eq!(world.read("umask").trim(), "0027");
        assert_eq!(field(&world.read("status"), "NoNewPrivs:"), "0");
        let limits = world.read("limits");
        let limit =
            |name: &str| field(&limits, name).split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        assert_eq!((limit("Max open files"), limit("Max core file size")), ("777 777".into(), "0 0".into()));
        let arguments = world.read("arguments");
        let address = world.address;
        let filled = format!("1/0/{address}/{}/{}", address.ip(), address.port());
        assert!(arguments.contains(&filled), "{arguments}");
        master.stop();
    });
}

/// A wrapper that starts the real worker and something else besides, and lets nothing through.
fn wrapped(world: &World, extra: &str) -> App {
    let script = format!("{extra} \"$0\" \"$@\" & wait");
    let mut command = vec!["/bin/sh".to_owned(), "-c".to_owned(), script];
    command.extend(test_worker("--mode plain"));
    App::new(world, command).workers(2)
}

#[test]
fn a_wrappers_children_are_found_and_go_with_it() {
    world(&[], |world| {
        let master = Master::start(world, &wrapped(world, "sleep 1000 &"));
        assert_eq!(processes_of(&world.app).len(), 6, "two workers of three processes each");
        master.upgrade();
        let left: Vec<_> = processes_of(&world.app).into_iter().filter(|one| one.generation == 1).collect();
        assert_eq!(left, [], "remains of generation 1");
        // And when the leader is killed: nobody else can end its children.
        let leader = master.serving()[0];
        kill([leader]);
        master.wait_status("serving again", |status| {
            let workers = &status.generations[0].workers;
            workers.iter().map(|worker| worker.restarts).sum::<u32>() == 1 && status.generations.len() == 1
        });
        master.stop();
    });
}

#[test]
fn remains_that_ignore_sigterm_are_killed() {
    world(&[], |world| {
        let app = wrapped(world, "sh -c 'trap \"\" TERM; sleep 1000' &").upgrade("drain_timeout = \"1s\"");
        let master = Master::start(world, &app);
        master.upgrade();
        let left: Vec<_> = processes_of(&world.app).into_iter().filter(|one| one.generation == 1).collect();
        assert_eq!(left, [], "remains of generation 1");
        master.stop();
    });
}

#[test]
fn output_is_tagged_or_inherited() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain --print hello-there").workers(1);
        let master = Master::start(world, &app);
        let pid = master.serving()[0].to_string();
        let log = master.log() + &world.read("master.out");
        let line = log.lines().find(|line| line.contains("hello-there")).unwrap_or_else(|| panic!("{log}"));
        assert!(line.contains(&pid), "{line}");
        master.stop();

        let master = Master::start(world, &app.clone().app("output = \"inherit\""));
        let log = master.log() + &world.read("master.out");
        assert!(log.lines().any(|line| line == "hello-there"), "{log}");
        master.stop();
    });
}

#[test]
fn the_masters_descriptors_do_not_grow() {
    world(&[], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode sdk").workers(2));
        let count = || fs::read_dir(format!("/proc/{}/fd", master.pid())).unwrap().count();
        master.upgrade();
        // The last client's own connection may not be gone yet, then or now.
        let before = (0..5).map(|_| (master.status(), count()).1).min().unwrap();
        for _ in 0..5 {
            master.upgrade();
        }
        master.wait_status("back to as many descriptors as before", |_| count() <= before);
        master.stop();
    });
}

#[test]
fn an_unusable_start_is_a_reason_not_a_crash() {
    world(&[], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(2);
        let master = Master::start(world, &app);
        // A limit below what the exec itself needs: the spawn fails in the child.
        app = app.app("limits = { nofile = 2 }");
        app.write();
        let (code, receipt) = master.failing_upgrade();
        assert_eq!(code, 1, "{receipt:#?}");
        assert_eq!(master.status().active_generation, Some(1));
        master.stop();
    });
}
