//! What is around the process: where its program is found, its descriptors, its keeper, the service manager.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use reuseportd_wire::status::{MasterState, Status};

use super::{Program, executes, identity, reexec};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::master::{Master, REUSEPORTD};
use crate::support::world::{World, needs_of, tool, world};

/// Started by this shell line in the world's directory, a master executes what is at `bin/reuseportd`, again and again.
fn follows_its_name(world: &World, line: &str) {
    let program = Program::new(world);
    let mut command = Command::new("sh");
    let line = format!("{line} \"$@\"");
    command.args(["-c", &line, "-"]).current_dir(world.path(""));
    let mut master = Master::launch(world, &App::test_worker(world, "--mode plain").workers(1), command);
    master.wait_ready();
    assert_eq!(executes(master.pid()), identity(Path::new(REUSEPORTD)), "{line}");
    for _ in 0..2 {
        program.become_copy(Path::new(REUSEPORTD), "755");
        let updated = identity(&program.path);
        assert_ne!(executes(master.pid()), updated);
        reexec(&master);
        assert_eq!(executes(master.pid()), updated, "{line}: {}", master.log());
    }
    // The next one finds the way from there too: to where a link leads now.
    for _ in 0..2 {
        program.link_to(Path::new(REUSEPORTD));
        reexec(&master);
        assert_eq!(executes(master.pid()), identity(Path::new(REUSEPORTD)), "{line}");
        let other = world.path("other");
        tool(&format!("install -m 755 {REUSEPORTD} {}", other.display()));
        program.link_to(&other);
        reexec(&master);
        assert_eq!(executes(master.pid()), identity(&other), "{line}");
    }
    assert_eq!(master.status().master.reexecs, 6);
    master.stop();
    fs::remove_dir_all(world.path("bin")).unwrap();
}

#[test]
fn the_program_is_found_by_the_name_it_was_started_with() {
    world(&[], |world| {
        follows_its_name(world, "exec ./bin/reuseportd");
        follows_its_name(world, "cd bin; exec ./reuseportd");
        // What is not executable is not found there by a shell either.
        fs::create_dir(world.path("first")).unwrap();
        fs::write(world.path("first/reuseportd"), "").unwrap();
        follows_its_name(world, "PATH=first:bin:$PATH; exec reuseportd");
        follows_its_name(
            world,
            &format!("PATH={}:$PATH; cd /; exec reuseportd", world.path("bin").display()),
        );
    });
}

/// What a process has open: by number, without what tells one socket from another.
fn descriptors(pid: u32) -> BTreeMap<u32, String> {
    // An old keeper may leave meanwhile.
    let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().filter_map(|entry| {
        let entry = entry.ok()?;
        let target = fs::read_link(entry.path()).ok()?.to_str()?.to_owned();
        Some((entry.file_name().to_str()?.parse().ok()?, target))
    });
    open.collect()
}

/// Their sorts, and how many there are of each.
fn sorts(pid: u32) -> BTreeMap<String, usize> {
    let mut sorts = BTreeMap::new();
    for target in descriptors(pid).into_values() {
        let sort = target.split(":[").next().unwrap_or_default().to_owned();
        *sorts.entry(sort).or_default() += 1;
    }
    sorts
}

/// Children with the first line of their state and their arguments.
fn children(pid: u32) -> Vec<(u32, String, bool)> {
    let pids = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let child = |pid: &str| {
        let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some((pid.parse().ok()?, arguments.replace('\0', " "), stat.contains(") Z ")))
    };
    pids.split_whitespace().filter_map(child).collect()
}

/// The only keeper, once it is that and no child is a zombie.
fn keeper(master: &Master) -> u32 {
    let begun = Instant::now();
    loop {
        // A round trip to the master, which paces the loop.
        master.status();
        let children = children(master.pid());
        let keepers: Vec<u32> =
            children.iter().filter(|one| one.1.contains(" keeper ")).map(|one| one.0).collect();
        if let ([keeper], false) = (&keepers[..], children.iter().any(|one| one.2)) {
            return *keeper;
        }
        assert!(begun.elapsed() < PATIENCE, "{children:#?}\n{}", master.log());
    }
}

/// The sorts that are seen five times in a row, so that what is open for a moment only is not among them.
fn usual(master: &Master, pid: u32) -> BTreeMap<String, usize> {
    let (begun, mut seen, mut times) = (Instant::now(), sorts(pid), 1);
    while times < 5 {
        assert!(begun.elapsed() < PATIENCE, "{seen:#?}\n{}", master.log());
        master.status();
        let now = sorts(pid);
        times = if now == seen { times + 1 } else { 1 };
        seen = now;
    }
    seen
}

/// Waits until a process has the same open as before: for a moment there are clients, and the last snapshot.
fn assert_flat(master: &Master, of: impl Fn(&Master<'_>) -> u32, before: &BTreeMap<String, usize>) {
    let begun = Instant::now();
    while sorts(of(master)) != *before {
        assert!(begun.elapsed() < PATIENCE, "{before:#?} {:#?}\n{}", descriptors(of(master)), master.log());
        master.status();
    }
}

fn nothing_piles_up(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = App::test_worker(world, &format!("--mode {mode}")).workers(2).engine(engine);
        let master = Master::start(world, &app);
        // From the first upgrade on the program of the generation before is held, too.
        master.upgrade();
        let first = keeper(&master);
        let (before, of_keeper) = (usual(&master, master.pid()), usual(&master, first));
        reexec(&master);
        // Soon there is one of the new program.
        let begun = Instant::now();
        while keeper(&master) == first {
            assert!(begun.elapsed() < PATIENCE, "{}", master.log());
        }
        let workers = master.serving();
        let of_workers: Vec<_> = workers.iter().map(|pid| descriptors(*pid)).collect();
        for _ in 0..20 {
            reexec(&master);
            assert_flat(&master, keeper, &of_keeper);
            assert_flat(&master, |master| master.pid(), &before);
        }
        assert_eq!(workers.iter().map(|pid| descriptors(*pid)).collect::<Vec<_>>(), of_workers);
        let of_first = sorts(workers[0]);
        master.upgrade();
        for worker in master.serving() {
            let environment = fs::read(format!("/proc/{worker}/environ")).unwrap();
            assert!(!String::from_utf8_lossy(&environment).contains("REUSEPORTD_RESUME"));
            assert_eq!(
                sorts(worker),
                of_first,
                "a worker inherits what it should not: {:#?}",
                descriptors(worker)
            );
        }
        assert_flat(&master, keeper, &of_keeper);
        assert_flat(&master, |master| master.pid(), &before);
        master.stop();
    });
}

#[test]
fn descriptors_do_not_pile_up_sdk_ebpf() {
    nothing_piles_up("ebpf", "sdk");
}

#[test]
fn descriptors_do_not_pile_up_unmodified_cbpf() {
    nothing_piles_up("cbpf", "plain");
}

#[test]
fn descriptors_do_not_pile_up_with_sockets_of_the_master() {
    nothing_piles_up("ebpf", "activated");
}

#[test]
fn the_service_manager_hears_of_it_and_goes_on_being_told() {
    world(&[], |world| {
        // As systemd sets it, which knows the pid of what it starts.
        let start = |pid: &str| {
            let mut command = Command::new("sh");
            let sets = format!("export WATCHDOG_USEC=400000 WATCHDOG_PID={pid}; exec \"$0\" \"$@\"");
            command.args(["-c", &sets, REUSEPORTD]);
            let mut master =
                Master::launch(world, &App::test_worker(world, "--mode sdk").workers(1), command);
            master.wait_ready();
            master
        };
        let master = start("$$");
        let told =
            |mark, line| master.upstream.wait(mark, line, PATIENCE).unwrap_or_else(|| panic!("no {line}"));
        for _ in 0..3 {
            let mark = master.upstream.mark();
            reexec(&master);
            let over = told(mark, concat!("STATUS=goes on as version ", env!("CARGO_PKG_VERSION")));
            let first = told(over, "WATCHDOG=1");
            told(first, "WATCHDOG=1");
            // The service has been ready all the time.
            let since = master.upstream.told().split_off(mark);
            let quiet = ["READY=", "RELOADING=", "STOPPING=", "MAINPID="];
            assert!(!since.iter().any(|said| quiet.iter().any(|word| said.contains(word))), "{since:#?}");
        }
        let mark = master.upstream.mark();
        master.hup();
        assert!(master.upstream.wait(mark, "RELOADING=1", PATIENCE).is_some());
        master.stop();

        // Another process is watched: nobody is told that this one lives.
        let master = start("1");
        reexec(&master);
        let begun = Instant::now();
        let steady = |status: &Status| {
            status.state == MasterState::Steady && begun.elapsed() > std::time::Duration::from_secs(1)
        };
        master.wait_status("steady for a while", steady);
        assert!(!master.upstream.told().join("\n").contains("WATCHDOG="), "{:#?}", master.upstream.told());
        master.stop();
    });
}
