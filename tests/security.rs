//! What those can do who should not: other users, workers that pretend, whoever can write where the master does.

mod control;
mod descriptors;
mod escapes;
mod files;
mod oversize;
mod ready;

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::master::REUSEPORTD;
use crate::support::process::{Done, Running};
use crate::support::world::{World, tool};

/// No account, and nobody else here.
pub(crate) const STRANGER: u32 = 61_236;

/// A subcommand that finds the master by its socket, for the config may be of no use.
pub(crate) fn ask(world: &World, words: &str) -> Done {
    let mut command = Command::new(REUSEPORTD);
    command.args(words.split_whitespace()).arg("--socket").arg(world.path("run/control.sock"));
    Running::start(command).finish(PATIENCE)
}

/// How many descriptors a process has open.
pub(crate) fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Memory of a process that no file is behind, in KiB.
pub(crate) fn memory_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Workers as `test_worker` makes them with these options; that of seat 0 has a child, this Python program, which begins
/// when [`begin`] is called.
pub(crate) fn beside_worker(world: &World, options: &str, python: &str) -> App {
    let script = world.path("beside.py");
    let [go, done] = ["go", "done"].map(|name| world.path(name));
    if !go.exists() {
        tool(&format!("mkfifo {} {}", go.display(), done.display()));
    }
    let text = format!(
        "import array, os, select, socket, sys\n\
         if os.environ['REUSEPORTD_SEAT'] != '0': sys.exit()\n\
         open({go:?}).read()\n{python}\nopen({done:?}, 'w').write('done')\n"
    );
    fs::write(&script, text).unwrap();
    let line = format!("python3 {} & exec {}", script.display(), test_worker(options).join(" "));
    App::new(world, ["/bin/sh", "-c", &line])
}

/// Lets the program beside a worker do its work.
pub(crate) fn begin(world: &World) -> Running {
    let line =
        format!(": >{}; exec timeout 60 cat {}", world.path("go").display(), world.path("done").display());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &line]);
    Running::start(command)
}

/// Waits for its end, which may have come with its worker's.
pub(crate) fn over(world: &World, beside: Running) {
    // Whoever waits for the pipe's writer has one now, and it is gone.
    drop(fs::File::options().read(true).write(true).open(world.path("done")).unwrap());
    assert_eq!(beside.finish(PATIENCE).code, 0);
}

/// Lets it, and waits until it is done.
pub(crate) fn let_go(world: &World) {
    assert_eq!(begin(world).finish(PATIENCE).stdout, "done");
}

/// The program as another user, who may execute it.
pub(crate) fn as_user(world: &World, uid: u32) -> Command {
    use std::os::unix::process::CommandExt;
    let program = world.path("reuseportd");
    if !program.exists() {
        tool(&format!("install -m 755 {REUSEPORTD} {}", program.display()));
    }
    let mut command = Command::new(program);
    command.uid(uid).gid(uid).current_dir(Path::new("/"));
    command
}
