//! `reuseportd-bench`: makes load and says what became of every connection.

use clap::{Args, Parser, Subcommand};
use jiff::SignedDuration;
use reuseportd_bench::{Error, Protocol, Spec, flows, raise_open_files_limit, run};
use serde::Serialize;
use std::fmt::Display;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

/// Makes load on a service and says what became of every connection
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Open-loop load on one address; exit code 0 only if nothing was lost
    Load(Load),
    /// Flows of datagrams to one UDP address; exit code 0 only if every datagram was answered
    Flows(Flows),
}

#[derive(Args)]
struct Flows {
    /// Where the service receives; it answers each datagram with `GENERATION SEAT PID ` and the datagram
    address: SocketAddr,
    /// Flows that last as long as the run
    #[arg(long, default_value_t = 0)]
    flows: u32,
    /// Datagrams per second of all flows together, in turn
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    /// Further flows begun per second, each with a datagram at once
    #[arg(long, default_value_t = 0.0)]
    new_flows: f64,
    /// How long each of these lasts
    #[arg(long, default_value = "1s", value_parser = duration)]
    new_life: Duration,
    /// How many of the lasting flows are silent at times
    #[arg(long, default_value_t = 0)]
    pausing: u32,
    /// How long these speak before they are silent
    #[arg(long, default_value = "1s", value_parser = duration)]
    speak: Duration,
    /// How long they are silent
    #[arg(long, default_value = "1s", value_parser = duration)]
    pause: Duration,
    /// How long datagrams are sent
    #[arg(long = "for", default_value = "10s", value_parser = duration, value_name = "DURATION")]
    duration: Duration,
    /// End after this many datagrams
    #[arg(long)]
    limit: Option<u64>,
    /// How long answers are waited for after the last datagram
    #[arg(long, default_value = "5s", value_parser = duration)]
    answer_timeout: Duration,
    /// Receive buffer of each flow in bytes, as far as the kernel grants it
    #[arg(long, default_value_t = 4 << 20)]
    receive_buffer: usize,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

impl Flows {
    fn spec(&self) -> flows::Spec {
        flows::Spec {
            target: self.address,
            flows: self.flows,
            rate: self.rate,
            new_flows: self.new_flows,
            new_life: self.new_life,
            pausing: self.pausing,
            speak: self.speak,
            pause: self.pause,
            duration: Some(self.duration),
            limit: self.limit,
            answer_timeout: self.answer_timeout,
            receive_buffer: self.receive_buffer,
        }
    }
}

#[derive(Args)]
struct Load {
    /// Where the service listens, for example 127.0.0.1:8080
    address: SocketAddr,
    /// New connections per second
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    /// Let new connections arrive at random (Poisson) instead of evenly
    #[arg(long)]
    poisson: bool,
    /// Connections per burst
    #[arg(long, default_value_t = 0)]
    burst: u32,
    /// Time from burst to burst
    #[arg(long, default_value = "300ms", value_parser = duration)]
    burst_every: Duration,
    /// Clients that are silent for a while, or send their request in pieces meanwhile
    #[arg(long, default_value_t = 0)]
    slow: u32,
    /// Clients that are silent for a while, for services with TCP_DEFER_ACCEPT
    #[arg(long, default_value_t = 0)]
    half_open: u32,
    /// Shortest silence of slow and half-open clients
    #[arg(long, default_value = "200ms", value_parser = duration)]
    silence_min: Duration,
    /// Longest silence of slow and half-open clients
    #[arg(long, default_value = "600ms", value_parser = duration)]
    silence_max: Duration,
    /// Clients that ask again and again on one connection
    #[arg(long, default_value_t = 0)]
    keep_alive: u32,
    /// Time from request to request on a keep-alive connection
    #[arg(long, default_value = "50ms", value_parser = duration)]
    keep_alive_every: Duration,
    /// Requests per keep-alive connection
    #[arg(long, default_value_t = 100)]
    keep_alive_requests: u32,
    /// How long connections are issued
    #[arg(long = "for", default_value = "10s", value_parser = duration, value_name = "DURATION")]
    duration: Duration,
    /// End after this many connections
    #[arg(long)]
    limit: Option<u64>,
    /// How long an unanswered SYN is waited for
    #[arg(long, default_value = "5s", value_parser = duration)]
    connect_timeout: Duration,
    /// How long a response is waited for
    #[arg(long, default_value = "5s", value_parser = duration)]
    response_timeout: Duration,
    /// Source addresses 127.0.0.1 … used in turn towards 127.0.0.0/8; 0: the kernel chooses
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u8).range(..=254))]
    sources: u8,
    /// Seed of all random choices
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What to GET
    #[arg(long, default_value = "/")]
    path: String,
    /// Send a line and expect it back in upper case, instead of HTTP
    #[arg(long, conflicts_with = "path")]
    echo: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

impl Load {
    fn spec(&self) -> Spec {
        Spec {
            target: self.address,
            protocol: if self.echo { Protocol::Echo } else { Protocol::Http(self.path.clone()) },
            rate: self.rate,
            poisson: self.poisson,
            burst: self.burst,
            burst_every: self.burst_every,
            slow: self.slow,
            half_open: self.half_open,
            silence: (self.silence_min, self.silence_max),
            keep_alive: self.keep_alive,
            keep_alive_every: self.keep_alive_every,
            keep_alive_requests: self.keep_alive_requests,
            duration: Some(self.duration),
            limit: self.limit,
            connect_timeout: self.connect_timeout,
            response_timeout: self.response_timeout,
            sources: self.sources,
            seed: self.seed,
        }
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration: SignedDuration =
        text.parse().map_err(|error| format!("{error}; write it as 250ms, 30s or 5m"))?;
    Duration::try_from(duration).map_err(|_| "must not be negative".into())
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    if let Err(error) = raise_open_files_limit() {
        eprintln!("reuseportd-bench: warning: limit of open files not raised: {error}");
    }
    match command {
        Command::Load(load) => {
            finish(run(load.spec()), load.json, |report| report.lost() == 0 && report.valid())
        }
        Command::Flows(load) => {
            finish(flows::run(load.spec()), load.json, |report| report.lost() == 0 && report.valid())
        }
    }
}

fn finish<R: Serialize + Display>(
    report: Result<R, Error>,
    json: bool,
    is_good: impl Fn(&R) -> bool,
) -> ExitCode {
    let report = match report {
        Ok(report) => report,
        Err(error) => {
            eprintln!("reuseportd-bench: {error}");
            return ExitCode::from(if matches!(error, Error::Spec(_)) { 2 } else { 1 });
        }
    };
    match show(&report, json) {
        Ok(()) if is_good(&report) => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("reuseportd-bench: the report can't be written: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show(report: &(impl Serialize + Display), json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, report)?;
        writeln!(out)
    } else {
        write!(out, "{report}")
    }
}
