//! The promise, shown in a quarter of a minute: a real master, real workers, real load, three upgrades by SIGHUP.
//! Then the same load on workers that are replaced the ordinary way, so that you see what it would have cost.
//!
//! `cargo run --example demo` builds what it needs, uses a free port of 127.0.0.1 and a temporary directory, and
//! leaves nothing behind. Exit code 0: nothing was lost, and the control did lose.

#![forbid(unsafe_code)]

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reuseportd_bench::{Report, Running, Spec};
use reuseportd_wire::status::{Outcome, Receipt, Status};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

type Fallible<T> = Result<T, Box<dyn Error>>;

const WORKERS: u32 = 4;
/// Work per accept: queues build up, and what is in a queue is what a careless upgrade loses.
const ACCEPT_DELAY_MS: u32 = 5;
/// New connections per second besides the bursts; together three quarters of what the workers can take.
const RATE: f64 = 100.0;
const BURST: u32 = 150;
const BURST_EVERY: Duration = Duration::from_millis(300);
const UPGRADES: u32 = 3;
/// Answers to see before each upgrade and at the end: about a second's worth.
const ANSWERS_BETWEEN: u64 = 600;
/// From line to line.
const TICK: Duration = Duration::from_millis(500);
/// Bound of each wait: many times what it takes.
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    match demonstrate() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demonstrate() -> Fallible<ExitCode> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    let programs = Programs::build()?;
    let per_second = RATE + f64::from(BURST) / BURST_EVERY.as_secs_f64();
    println!(
        "{WORKERS} workers, {ACCEPT_DELAY_MS} ms of work per accept; {per_second} new connections a second, most in bursts of {BURST}."
    );

    println!("\n1. Under reuseportd: {UPGRADES} upgrades by SIGHUP");
    let ours = Stage::set(&programs, &interrupted, "plain", "auto", "")?;
    println!("   {}", ours.engine()?);
    let ours = ours.play(UPGRADES)?;

    println!("\n2. The control, same load: no steering, old workers just end");
    let careless = "drain_timeout = \"1s\"\nsettle_timeout = \"100ms\"";
    let control = Stage::set(&programs, &interrupted, "naive", "none", careless)?.play(UPGRADES)?;

    println!();
    println!("reuseportd: {} lost of {} connections", ours.lost(), ours.issued);
    println!("control:    {} lost of {} connections{}", control.lost(), control.issued, fates(&control));
    for report in [&ours, &control] {
        if !report.valid() {
            return Err(
                format!("the load generator itself failed, so the numbers say nothing:\n{report}").into()
            );
        }
    }
    if ours.lost() > 0 {
        return Err(format!("this must not happen; what became of each:\n{ours}").into());
    }
    if control.lost() == 0 {
        return Err("the control lost nothing either, so the zero above proves nothing: run it again on a quieter machine".into());
    }
    Ok(ExitCode::SUCCESS)
}

/// The ways in which connections were lost, with their numbers.
fn fates(report: &Report) -> String {
    let lost = report.fates.iter().filter(|(fate, count)| fate.is_loss() && *count > 0);
    let words: Vec<_> =
        lost.map(|(fate, count)| format!("{count} {}", fate.name().replace('_', " "))).collect();
    if words.is_empty() { String::new() } else { format!(" ({})", words.join(", ")) }
}

/// What is shown here, as built from this repository.
struct Programs {
    master: PathBuf,
    worker: PathBuf,
}

impl Programs {
    /// Builds both beside this very program, in its profile.
    fn build() -> Fallible<Programs> {
        let examples = env::current_exe()?.parent().map(Path::to_owned).unwrap_or_default();
        let profile = examples.parent().map(Path::to_owned).unwrap_or_default();
        let name = profile.file_name().unwrap_or_default().to_string_lossy().replace("debug", "dev");
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["build", "--bin", "reuseportd", "--example", "test_worker", "--profile", &name])
            .status()?;
        let programs = Programs { master: profile.join("reuseportd"), worker: examples.join("test_worker") };
        if built.success() && programs.master.exists() && programs.worker.exists() {
            return Ok(programs);
        }
        Err(format!("{} is not there: cargo build --bins --examples", programs.master.display()).into())
    }
}

/// A master with its workers, and the load on them.
struct Stage<'a> {
    programs: &'a Programs,
    interrupted: &'a AtomicBool,
    directory: TempDir,
    notify: UnixDatagram,
    address: SocketAddr,
    master: Child,
}

impl<'a> Stage<'a> {
    /// Starts a master and waits until its first generation serves.
    fn set(
        programs: &'a Programs,
        interrupted: &'a AtomicBool,
        mode: &str,
        engine: &str,
        upgrade: &str,
    ) -> Fallible<Stage<'a>> {
        let directory = tempfile::Builder::new().prefix("reuseportd-demo-").tempdir()?;
        let path = directory.path();
        // The kernel finds a free port; the group of listeners needs one that is known beforehand.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let config = format!(
            "[app]\nname = \"demo\"\nworkers = {WORKERS}\n\
             command = [{:?}, \"--mode\", \"{mode}\", \"--accept-delay\", \"{ACCEPT_DELAY_MS}\"]\n\
             [[listen]]\naddress = \"{address}\"\n[steering]\nengine = \"{engine}\"\n\
             [upgrade]\nstop_when = \"drained\"\n{upgrade}\n[control]\nsocket = {:?}\n",
            programs.worker,
            path.join("run/control.sock")
        );
        fs::write(path.join("demo.toml"), config)?;
        let notify = UnixDatagram::bind(path.join("notify.sock"))?;
        let master = Command::new(&programs.master)
            .arg("--config")
            .arg(path.join("demo.toml"))
            .env("NOTIFY_SOCKET", path.join("notify.sock"))
            .stdout(File::create(path.join("output"))?)
            .stderr(File::create(path.join("log"))?)
            .process_group(0) // Ctrl-C is for the demo, which then stops the master
            .spawn()?;
        let stage = Stage { programs, interrupted, directory, notify, address, master };
        stage.until_told("READY=1", || {})?;
        Ok(stage)
    }

    /// Runs the load through so many upgrades.
    fn play(self, upgrades: u32) -> Fallible<Report> {
        let load = reuseportd_bench::spawn(
            Spec::new(self.address)
                .rate(RATE)
                .burst(BURST, BURST_EVERY)
                .slow(20)
                .timeouts(PATIENCE, PATIENCE),
        )?;
        self.until_answered(&load, ANSWERS_BETWEEN)?;
        for _ in 0..upgrades {
            self.upgrade(&load)?;
            self.until_answered(&load, ANSWERS_BETWEEN)?;
        }
        Ok(load.stop_and_join()?)
    }

    fn upgrade(&self, load: &Running) -> Fallible<()> {
        let (pid, lost_before) = (self.master.id(), load.live().fates.lost());
        let receipts_before = self.status()?.last_upgrade.map(|receipt| receipt.to);
        println!("   kill -HUP {pid}");
        self.signal(Signal::HUP)?;
        self.until_told("RELOADING=1", || show(load))?;
        self.until_told("READY=1", || show(load))?;
        let receipt = self.status()?.last_upgrade.filter(|receipt| Some(receipt.to) != receipts_before);
        let receipt = receipt.ok_or("the master gives no receipt")?;
        println!("   {}", in_words(&receipt, load.live().fates.lost() - lost_before));
        match receipt.outcome {
            Outcome::Completed => Ok(()),
            outcome => {
                Err(self.failed(&format!("upgrade {outcome}: {}", receipt.reason.unwrap_or_default())))
            }
        }
    }

    /// Which engine, and why.
    fn engine(&self) -> Fallible<String> {
        let status = self.status()?;
        let listener = status.listeners.first().ok_or("the master shows no listener")?;
        let pid = status.master.pid;
        Ok(format!(
            "master {pid} on {}, engine {} ({})",
            listener.address, listener.engine, listener.engine_reason
        ))
    }

    fn status(&self) -> Fallible<Status> {
        let config = self.directory.path().join("demo.toml");
        let output = Command::new(&self.programs.master)
            .args(["status", "--json", "--config"])
            .arg(config)
            .output()?;
        if !output.status.success() {
            return Err(self.failed(&String::from_utf8_lossy(&output.stderr)));
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn signal(&self, signal: Signal) -> Fallible<()> {
        let pid = Pid::from_raw(self.master.id().cast_signed()).ok_or("the master has no pid")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Reads what the master tells its service manager, until it is this.
    fn until_told(&self, line: &str, tick: impl Fn()) -> Fallible<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut datagram = [0; 8192];
        self.notify.set_read_timeout(Some(TICK))?;
        while Instant::now() < deadline {
            match self.notify.recv(&mut datagram) {
                Ok(length)
                    if String::from_utf8_lossy(&datagram[..length]).lines().any(|told| told == line) =>
                {
                    return Ok(());
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    tick()
                }
                Err(error) => return Err(error.into()),
            }
            self.check_interrupted()?;
        }
        Err(self.failed(&format!("the master does not say {line}")))
    }

    /// Shows the load until so many more answers have come.
    fn until_answered(&self, load: &Running, answers: u64) -> Fallible<()> {
        let (goal, deadline) = (load.live().answers + answers, Instant::now() + PATIENCE);
        while load.wait_until(TICK, |live| live.answers >= goal).is_err() {
            show(load);
            self.check_interrupted()?;
            if Instant::now() > deadline {
                return Err(self.failed("the load is not answered"));
            }
        }
        Ok(())
    }

    fn check_interrupted(&self) -> Fallible<()> {
        if self.interrupted.load(Ordering::SeqCst) { Err("interrupted".into()) } else { Ok(()) }
    }

    /// The error, with the end of the master's log.
    fn failed(&self, what: &str) -> Box<dyn Error> {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        format!("{what}\nthe master's log ends:\n{}", lines[lines.len().saturating_sub(20)..].join("\n"))
            .into()
    }
}

impl Drop for Stage<'_> {
    /// A graceful stop would wait for clients that are gone: at once, then.
    fn drop(&mut self) {
        if self.signal(Signal::QUIT).is_err() {
            let _ = self.master.kill();
        }
        let _ = self.master.wait();
    }
}

/// One line of the load as it is now.
fn show(load: &Running) {
    let live = load.live();
    let open = live.issued - live.fates.total();
    let generations: Vec<_> =
        live.generations.iter().map(|(number, answers)| format!("{number}: {answers}")).collect();
    println!(
        "   {:4.1} s  {open:3} waiting  {:3} lost  answers by generation  {}",
        load.started().elapsed().as_secs_f64(),
        live.fates.lost(),
        generations.join("  ")
    );
}

/// A receipt in a line.
fn in_words(receipt: &Receipt, lost: u64) -> String {
    let number = |number: Option<u32>| number.map_or_else(|| "?".to_owned(), |number| number.to_string());
    let phases: Vec<_> = receipt.phases.iter().map(|time| format!("{} {}", time.phase, time.ms)).collect();
    let queued: Option<u32> = receipt.listeners.iter().map(|listener| listener.queued_at_switch).sum();
    let queued = queued.map_or_else(String::new, |queued| format!(" {queued} waited in the old queues,"));
    format!(
        "{} -> {} {} in {} ms ({}):{queued} {lost} lost",
        number(receipt.from),
        number(receipt.to),
        receipt.outcome,
        receipt.duration_ms,
        phases.join(", "),
    )
}
