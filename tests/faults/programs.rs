//! Programs that the kernel does not execute, and that print more than anybody reads.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Instant;

use nix::sys::stat::Mode;
use reuseportd_wire::status::Outcome as Upgraded;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use super::descriptors::{comes_to_nothing, recovers, slow_workers};
use super::{Fault, under_load};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::load::slow_accepts;
use crate::support::master::Master;
use crate::support::world::{World, example};

/// A file that may be executed, with this text.
fn program(world: &World, name: &str, text: &[u8]) -> PathBuf {
    let path = world.path(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn the_program_is_not_executed() {
    under_load(
        &Fault {
            name: "exec refused: ENOEXEC, ETXTBSY, EACCES and ENOENT of an interpreter",
            when: "upgrade: the new workers",
            then: "rolled back, the reason names seat, program and error; the old workers are not touched",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let app = slow_workers(world, engine);
            let master = Master::start(world, &app);
            let load = load();
            let plain = world.path("plain");
            File::create(&plain).unwrap();
            let busy = program(world, "busy", &fs::read(example("test_worker")).unwrap());
            let _writer = OpenOptions::new().write(true).open(&busy).unwrap();
            let script = |name, by: &str| program(world, name, format!("#!{by}\n").as_bytes());
            for (program, error) in [
                (program(world, "nothing", b"\x7fELF"), "Exec format error"),
                (busy, "Text file busy"),
                (script("forbidden", plain.to_str().unwrap()), "Permission denied"),
                (script("missing", "/nonexistent/interpreter"), "No such file or directory"),
            ] {
                let mut changed = app.clone();
                changed.command = vec![program.to_str().unwrap().to_owned()];
                changed.write();
                let words = ["seat 0", program.to_str().unwrap(), "cannot execute the program", error];
                comes_to_nothing(&master, Upgraded::RolledBack, &words);
            }
            app.write();
            recovers(master, load)
        },
    );
}

/// Workers that write a line for each connection, with a child that prints three times as much as the pipe takes when
/// the test says so.
fn talkative(world: &World, engine: &'static str) -> (App, File) {
    let says_so = world.path("says-so");
    nix::unistd::mkfifo(&says_so, Mode::from_bits_truncate(0o666)).unwrap();
    let script = "(read go <\"$0\"; head -c 3145728 /dev/zero | tr '\\0' x | fold -w 1000) & exec \"$@\"";
    let mut app = slow_workers(world, engine);
    let mut command: Vec<String> =
        ["/bin/sh", "-c", script, says_so.to_str().unwrap()].map(String::from).into();
    command.extend(app.command.iter().cloned());
    command.extend(["--log", "/dev/stderr"].map(String::from));
    app.command = command;
    (app, OpenOptions::new().read(true).write(true).open(says_so).unwrap())
}

#[test]
fn a_workers_log_pipe_is_full() {
    under_load(
        &Fault {
            name: "log pipe full: a worker prints more than the 1 MiB it takes",
            when: "the master is stopped (SIGSTOP)",
            then: "who prints waits, and so do its clients; all goes on when the master does",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let (app, mut says_so) = talkative(world, engine);
            let master = Master::start(world, &app);
            let load = load();
            let workers = master.serving();
            master.signal(Signal::STOP);
            says_so.write_all(&b"go\n".repeat(workers.len())).unwrap();
            for worker in workers {
                wait_full(worker);
            }
            master.signal(Signal::CONT);
            load.answered(600);
            recovers(master, load)
        },
    );
}

/// Waits until nothing more can be written to a worker's output.
fn wait_full(worker: u32) {
    let pipe = OpenOptions::new().write(true).open(format!("/proc/{worker}/fd/2")).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    while poll(&mut [PollFd::new(&pipe, PollFlags::OUT)], Some(&now)).unwrap() > 0 {
        assert!(Instant::now() < deadline, "the pipe takes more and more");
        std::thread::yield_now();
    }
}
