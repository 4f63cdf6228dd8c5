//! Config and program that change or vanish at the wrong moment, and a clock that jumps.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use reuseportd_wire::status::{MasterState, Outcome as Upgraded};

use super::descriptors::{recovers, slow_workers};
use super::{Fault, under_load};
use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::load::slow_accepts;
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{kill, processes_of};
use crate::support::watch::seats;
use crate::support::world::{Need, World, example, tool};
use crate::watchdog::restarts;

#[test]
fn no_config_to_reload() {
    under_load(
        &Fault {
            name: "the config file is gone",
            when: "before a SIGHUP",
            then: "refused, the reason names the file; the old workers are not touched",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let app = slow_workers(world, engine);
            let master = Master::start(world, &app);
            let (load, before) = (load(), master.serving());
            fs::remove_file(&app.path).unwrap();
            master.hup();
            // The client finds the master by it.
            app.write();
            let receipt = master.status().last_upgrade.expect("every wish leaves a receipt");
            let reason = receipt.reason.unwrap_or_default();
            assert_eq!((receipt.outcome, master.serving()), (Upgraded::Refused, before), "{reason}");
            for word in ["app.toml", "No such file"] {
                assert!(
                    reason.contains(word) && master.log().contains(&reason),
                    "{reason}\n{}",
                    master.log()
                );
            }
            recovers(master, load)
        },
    );
}

#[test]
fn the_config_vanishes_while_launching() {
    under_load(
        &Fault {
            name: "the config file is gone",
            when: "upgrade: after it was read, while launching; then a worker is killed",
            then: "completed; it is not read again until the next upgrade, nor to fill a seat",
            lost: "what the killed worker had accepted and not answered",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let mut app = slow_workers(world, engine);
            let master = Master::start(world, &app);
            let load = load();
            app.command = test_worker("--mode sdk --accept-delay 5 --ready-delay 1000");
            app.write();
            let waits = master.begin("upgrade --wait --json");
            master.wait_status("launching", |status| status.state == MasterState::Launching);
            fs::remove_file(&app.path).unwrap();
            let (code, receipt) = master.receipt(waits.finish(PATIENCE));
            assert_eq!((code, receipt.outcome), (0, Upgraded::Completed), "{receipt:#?}");
            load.answered_by(2);
            let new =
                processes_of(&world.app).into_iter().find(|one| one.generation == 2).expect("one of four");
            kill([new.pid]);
            load.answered(300);
            app.write();
            master.wait_status("filled again", |status| {
                restarts(status) == 1 && seats(status, 2).len() == 4 && status.generations.len() == 1
            });
            // Slow clients are among what it had in its hands.
            super::Outcome { excused: 20, ..recovers(master, load) }
        },
    );
}

/// What a process runs.
fn identity(path: &Path) -> (u64, u64) {
    let file = fs::metadata(path).unwrap();
    (file.dev(), file.ino())
}

/// The app that runs a program of the test's own, batch by batch.
fn rolling(world: &World, engine: &'static str) -> (App, PathBuf) {
    let program = world.path("program");
    // By another process: what this one has open for writing, a child of another thread may have open too.
    tool(&format!("install -m 755 {} {}", example("test_worker").display(), program.display()));
    let mut app = App::test_worker(world, "--mode sdk --accept-delay 5 --ready-delay 300").engine(engine);
    app.command[0] = program.to_str().unwrap().into();
    (app.upgrade("batch = 1"), program)
}

#[test]
fn the_program_is_replaced_while_launching() {
    under_load(
        &Fault {
            name: "the program is replaced by rename, or truncated in place",
            when: "upgrade: after the first batch of four",
            then: "completed, all seats run the file that was there at the beginning; the kernel refuses to truncate a \
                   file that is being run (ETXTBSY)",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let (app, program) = rolling(world, engine);
            let master = Master::start(world, &app);
            let load = load();
            // A new file, whose workers are of generation 2 alone.
            let next = world.path("next");
            tool(&format!("install -m 755 {} {}", example("test_worker").display(), next.display()));
            fs::rename(&next, &program).unwrap();
            let pinned = identity(&program);
            let waits = master.begin("upgrade --wait=drained --json");
            master.wait_status("one is new", |status| {
                let new = seats(status, 2).len();
                assert!(new < 4, "too late");
                new >= 1
            });
            let truncated = fs::File::options().write(true).truncate(true).open(&program);
            assert_eq!(truncated.unwrap_err().kind(), ErrorKind::ExecutableFileBusy);
            fs::write(&next, "no program").unwrap();
            fs::rename(&next, &program).unwrap();
            let (code, receipt) = master.receipt(waits.finish(PATIENCE));
            assert_eq!((code, receipt.outcome), (0, Upgraded::Completed), "{receipt:#?}\n{}", master.log());
            load.answered_by(2);
            for pid in master.serving() {
                assert_eq!(identity(Path::new(&format!("/proc/{pid}/exe"))), pinned);
            }
            fs::remove_file(&program).unwrap();
            tool(&format!("install -m 755 {} {}", example("test_worker").display(), program.display()));
            recovers(master, load)
        },
    );
}

const FAKETIME: Need = Need::Runs(
    "sh",
    &["-c", "ls /usr/lib/*/faketime/libfaketime.so.1 /usr/lib/faketime/libfaketime.so.1 | grep -q ."],
);

fn faketime() -> PathBuf {
    let places = fs::read_dir("/usr/lib").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
    let files = places.map(|place| place.join("faketime/libfaketime.so.1"));
    files
        .chain(["/usr/lib/faketime/libfaketime.so.1".into()])
        .find(|file| file.exists())
        .expect("it was found")
}

#[test]
fn the_clock_jumps() {
    under_load(
        &Fault {
            name: "the wall clock jumps by a day",
            when: "upgrade: baking; forward, and in the next one backward",
            then: "completed, and the bake lasts as long as it should: all deadlines are of the monotonic clock",
            lost: "",
        },
        &[FAKETIME],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let clock = world.path("clock");
            let set = |offset: &str| {
                fs::write(world.path("clock.new"), offset).unwrap();
                fs::rename(world.path("clock.new"), &clock).unwrap();
            };
            set("+0");
            let app = slow_workers(world, engine).upgrade("bake = \"2s\"");
            let mut command = Command::new(REUSEPORTD);
            command.env("LD_PRELOAD", faketime()).env("FAKETIME_TIMESTAMP_FILE", &clock);
            command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("FAKETIME_NO_CACHE", "1");
            let mut master = Master::launch(world, &app, command);
            master.wait_ready();
            let load = load();
            for (to, offset) in [(2, "+86400"), (3, "-86400")] {
                let waits = master.begin("upgrade --wait=drained --json");
                master.wait_status("baking", |status| status.state == MasterState::Baking);
                set(offset);
                let (code, receipt) = master.receipt(waits.finish(PATIENCE));
                assert_eq!((code, receipt.outcome), (0, Upgraded::Completed), "{receipt:#?}");
                let baked =
                    receipt.phases.iter().find(|one| format!("{:?}", one.phase) == "Baking").unwrap().ms;
                assert!((2000..10_000).contains(&baked), "{receipt:#?}");
                load.answered_by(to);
            }
            let day = |log: &str| log.lines().filter_map(|line| line.get(..10)).collect::<Vec<_>>().concat();
            assert!(day(&master.log()).len() > 10, "no clock in the log");
            recovers(master, load)
        },
    );
}
