//! UDP services: what is sent is answered, whoever comes and goes, and flows stay where they began.

mod bursts;
mod connected;
mod deaths;
mod dns;
mod families;
mod flows;
mod plain;
mod shares;
mod table;
mod together;

use std::time::Duration;

use reuseportd_bench::flows::Report;
use reuseportd_wire::status::{GenerationState, Outcome, Receipt, Status};

use crate::support::app::App;
use crate::support::flows::Flows;
use crate::support::master::Master;
use crate::support::world::{World, example, repository};

/// How much of a pause a busy machine may add to, or take from, what the kernel saw of it.
const BLUR: Duration = Duration::from_millis(150);

/// The programs that serve here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    /// On the SDK.
    UdpEcho,
    /// Plain Python.
    Python,
    /// The difficult worker with these options.
    Difficult(&'static str),
}

/// Four workers on the world's address.
fn app(world: &World, program: Program, engine: &'static str) -> App {
    let app = match program {
        Program::UdpEcho => App::new(world, [example("udp_echo").to_str().unwrap()]),
        Program::Python => {
            let script = repository("examples/udp_echo.py");
            App::new(world, ["python3", script.to_str().unwrap(), "{port.default}"])
        }
        Program::Difficult(options) => App::test_worker(world, options),
    };
    app.engine(engine).listen("protocol = \"udp\"")
}

/// Flows stay, unless they are idle for two seconds.
fn with_flows(app: App) -> App {
    app.engine("ebpf").listen("affinity = \"flow\"").listen("flow_timeout = \"2s\"")
}

/// As `with_flows` says.
const FLOW_TIMEOUT: Duration = Duration::from_secs(2);

/// An upgrade that must succeed; back when nothing new can reach the old generation.
fn upgrade(master: &Master) -> Receipt {
    let (code, receipt) = master.receipt(master.cli("upgrade --wait --json"));
    assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}\n{}", master.log());
    receipt
}

/// The generations that drain.
fn draining(status: &Status) -> Vec<u32> {
    let draining = status.generations.iter().filter(|one| one.state == GenerationState::Draining);
    draining.map(|one| one.generation).collect()
}

/// Waits until only this generation is left.
fn wait_alone(master: &Master, generation: u32) -> Status {
    master.wait_status("alone", |status| {
        status.active_generation == Some(generation) && status.generations.len() == 1
    })
}

/// Flows that changed their worker without having been idle for so long.
fn moved(report: &Report, timeout: Duration) -> Vec<String> {
    let mut found = Vec::new();
    for flow in &report.flows {
        for pair in flow.spans.windows(2) {
            let idle = Duration::from_micros(pair[1].first_us.saturating_sub(pair[0].last_us));
            if idle + BLUR < timeout {
                found.push(format!("{} after {idle:?}: {:?} {:?}", flow.source, pair[0].who, pair[1].who));
            }
        }
    }
    found
}

/// Demands that no datagram was lost, and no flow moved that was not idle.
fn stayed(flows: Flows) -> Report {
    let report = flows.end_lossless();
    assert_eq!(moved(&report, FLOW_TIMEOUT), Vec::<String>::new(), "{report}");
    report
}

/// What the master says was left unread by workers that ended; the log has to tell the same.
fn counted_losses(master: &Master) -> u64 {
    let counted = master.status().listeners.iter().map(|listener| listener.leftovers_lost).sum();
    let log = master.log();
    let told = log.lines().filter(|line| line.contains("event=\"datagrams_lost\""));
    let told: Option<u64> =
        told.map(|line| line.split("count=").nth(1)?.split(' ').next()?.parse::<u64>().ok()).sum();
    assert_eq!(told, Some(counted), "status and log tell the same: {log}");
    counted
}
