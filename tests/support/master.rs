//! A master under test.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use reuseportd_wire::status::{Outcome, Receipt, Status, WorkerState};
use rustix::process::Signal;

use super::PATIENCE;
use super::app::App;
use super::process::{Done, Running, keepers_of, kill, processes_of, signal, wait};
use super::upstream::Upstream;
use super::world::World;

/// The program under test.
pub(crate) const REUSEPORTD: &str = env!("CARGO_BIN_EXE_reuseportd");

/// A started master and the service manager that listens to it.
#[derive(Debug)]
pub(crate) struct Master<'a> {
    world: &'a World,
    child: Child,
    pub(crate) upstream: Upstream,
    config: PathBuf,
    log: PathBuf,
}

impl<'a> Master<'a> {
    /// Starts a master and waits until its first generation serves.
    pub(crate) fn start(world: &'a World, app: &App) -> Master<'a> {
        let mut master = Master::launch(world, app, Command::new(REUSEPORTD));
        master.wait_ready();
        master
    }

    /// The same as another user.
    pub(crate) fn start_as(world: &'a World, app: &App, program: PathBuf, uid: u32) -> Master<'a> {
        let mut command = Command::new(program);
        command.uid(uid).gid(uid);
        let mut master = Master::launch(world, app, command);
        master.wait_ready();
        master
    }

    /// Starts a master by this command and does not wait.
    pub(crate) fn launch(world: &'a World, app: &App, command: Command) -> Master<'a> {
        Master::launch_by(world, app, command, |mut command| command.spawn().unwrap())
    }

    /// The same, with the last step done by `spawn`.
    pub(crate) fn launch_by(
        world: &'a World,
        app: &App,
        mut command: Command,
        spawn: impl FnOnce(Command) -> Child,
    ) -> Master<'a> {
        app.write();
        let upstream = Upstream::listen(&world.path("notify.sock"));
        let log = world.path("master.log");
        let create = |path: &Path| fs::File::create(path).unwrap();
        arrange(&mut command, &app.path, &upstream, [create(&log), create(&world.path("master.out"))]);
        let child = spawn(command);
        Master { world, child, upstream, config: app.path.clone(), log }
    }

    /// Starts the next master in the place of one that has ended, and does not wait. What it says follows what is there.
    pub(crate) fn restart(&mut self) {
        self.restart_by(Command::new(REUSEPORTD));
    }

    /// The same by this command.
    pub(crate) fn restart_by(&mut self, mut command: Command) {
        let append = |path: &Path| fs::File::options().append(true).open(path).unwrap();
        let files = [append(&self.log), append(&self.world.path("master.out"))];
        arrange(&mut command, &self.config, &self.upstream, files);
        self.child = command.spawn().unwrap();
    }

    /// Waits until the restarted master answers, and demands that it has adopted what the former one left.
    pub(crate) fn wait_adopted(&self) -> Status {
        let deadline = Instant::now() + PATIENCE;
        while self.cli("status").code != 0 {
            assert!(Instant::now() < deadline, "the next master does not answer:\n{}", self.log());
        }
        let status = self.status();
        assert!(status.master.adopted && status.master.pid == self.pid(), "{status:#?}\n{}", self.log());
        status
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The name its processes are known by.
    pub(crate) fn app(&self) -> &str {
        &self.world.app
    }

    /// The directory of its control socket.
    pub(crate) fn runtime(&self) -> PathBuf {
        self.world.path("run")
    }

    /// Waits for READY=1.
    pub(crate) fn wait_ready(&mut self) {
        let ready = self.upstream.wait(0, "READY=1", PATIENCE);
        assert!(ready.is_some(), "the master does not get ready:\n{}", self.log());
    }

    /// What it has written to its stderr.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Connections that waited for a killed worker and had no one to go to, as the log counts them.
    pub(crate) fn counted_losses(&self) -> u64 {
        let counted = self.status().listeners.iter().map(|listener| listener.leftovers_lost).sum();
        let log = self.log();
        let told = log.lines().filter(|line| line.contains("event=\"leftovers_lost\""));
        let told: Option<u64> =
            told.map(|line| line.split("count=").nth(1)?.split(' ').next()?.parse::<u64>().ok()).sum();
        assert_eq!(told, Some(counted), "status and log tell the same");
        counted
    }

    /// Sends the master a signal.
    pub(crate) fn signal(&self, what: Signal) {
        signal(self.pid(), what);
    }

    /// SIGHUP; returns when the service manager has been told that the reload is over.
    pub(crate) fn hup(&self) {
        let mark = self.upstream.mark();
        self.signal(Signal::HUP);
        let begun = self.upstream.wait(mark, "RELOADING=1", PATIENCE);
        let over = begun.and_then(|begun| self.upstream.wait(begun, "READY=1", PATIENCE));
        assert!(over.is_some(), "no end of the reload is told: {:#?}\n{}", self.upstream.told(), self.log());
    }

    /// A subcommand, as it would be typed.
    pub(crate) fn cli(&self, words: &str) -> Done {
        self.begin(words).finish(PATIENCE)
    }

    /// A subcommand that goes on beside the test.
    pub(crate) fn begin(&self, words: &str) -> Running {
        let mut command = Command::new(REUSEPORTD);
        command.args(words.split_whitespace()).arg("--config").arg(&self.config);
        Running::start(command)
    }

    /// An upgrade that must succeed; back when the old generation has no process any more.
    pub(crate) fn upgrade(&self) -> Receipt {
        let (code, receipt) = self.receipt(self.cli("upgrade --wait=drained --json"));
        assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}\n{}", self.log());
        receipt
    }

    /// An upgrade that must not succeed: the client's exit code and the receipt in `status`.
    pub(crate) fn failing_upgrade(&self) -> (i32, Receipt) {
        let done = self.cli("upgrade --wait");
        let receipt = self.status().last_upgrade.expect("every wish leaves a receipt");
        let reason = receipt.reason.as_deref().unwrap_or("no reason");
        assert!(done.stderr.contains(reason), "{reason:?} is not what the client is told: {done:#?}");
        (done.code, receipt)
    }

    /// The receipt that `upgrade --wait --json` printed.
    pub(crate) fn receipt(&self, done: Done) -> (i32, Receipt) {
        let receipt = serde_json::from_str(&done.stdout);
        (done.code, receipt.unwrap_or_else(|error| panic!("{error}: {done:#?}\n{}", self.log())))
    }

    pub(crate) fn status(&self) -> Status {
        let done = self.cli("status --json");
        assert_eq!(done.code, 0, "{done:#?}\n{}", self.log());
        serde_json::from_str(&done.stdout).unwrap_or_else(|error| panic!("{error}: {}", done.stdout))
    }

    /// Asks for the status until it is as wanted. Each look is a round trip to the master, which paces the loop.
    pub(crate) fn wait_status(&self, what: &str, mut wanted: impl FnMut(&Status) -> bool) -> Status {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if wanted(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "never {what}: {status:#?}\n{}", self.log());
        }
    }

    /// Pids of the active generation's serving workers.
    pub(crate) fn serving(&self) -> Vec<u32> {
        let status = self.status();
        let active = status.generations.iter().filter(|one| Some(one.generation) == status.active_generation);
        let workers = active.flat_map(|generation| &generation.workers);
        workers
            .filter(|worker| worker.state == WorkerState::Serving)
            .filter_map(|worker| worker.pid)
            .collect()
    }

    /// SIGTERM: exit code 0, and nothing is left.
    pub(crate) fn stop(self) {
        self.signal(Signal::TERM);
        self.ended(0);
    }

    /// Waits for the master's own end, and demands that nothing is left behind.
    pub(crate) fn ended(mut self, code: i32) {
        let status = self.wait_end(PATIENCE).unwrap_or_else(|| panic!("does not end:\n{}", self.log()));
        assert_eq!(status, code, "{}", self.log());
        assert_eq!(processes_of(&self.world.app), [], "processes left behind:\n{}", self.log());
        assert!(keepers_of(&self.world.app).is_empty(), "a keeper is left behind:\n{}", self.log());
        let left = self.world.path("run").exists();
        assert!(!left, "the runtime directory is left behind");
    }

    /// The master's exit code, -1 for a signal; `None` if it goes on.
    pub(crate) fn wait_end(&mut self, patience: Duration) -> Option<i32> {
        wait(&mut self.child, patience).map(|status| status.code().unwrap_or(-1))
    }

    /// SIGKILL to the master alone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Master<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of the master:\n{}", tail(&self.log()));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A worker may be starting a child while it is looked for.
        for left in
            std::iter::repeat_with(|| processes_of(&self.world.app)).take_while(|left| !left.is_empty())
        {
            kill(left.iter().map(|process| process.pid));
        }
        kill(keepers_of(&self.world.app));
        if let Ok(cgroup) = fs::read_link(self.world.path("run/control.sock.cgroup")) {
            for below in fs::read_dir(&cgroup).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(below.path());
            }
            let _ = fs::remove_dir(cgroup);
        }
        // What a killed master could not remove.
        let _ = fs::remove_dir_all(self.world.path("run"));
    }
}

/// What every master of the harness is told.
fn arrange(command: &mut Command, config: &Path, upstream: &Upstream, [log, out]: [fs::File; 2]) {
    command
        .args(["--log-format", "text", "--config"])
        .arg(config)
        .env("NOTIFY_SOCKET", upstream.path())
        .stderr(log)
        .stdout(out);
}

/// The last lines of a text.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(80)..].join("\n")
}
