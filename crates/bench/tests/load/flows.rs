//! What becomes of datagrams is seen, and counted as the server counts it, and each flow knows who answered it when.

use crate::server;
use reuseportd_bench::flows::{FlowReport, Report, Spec, run, spawn};
use reuseportd_bench::{Error, Running};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const N: u64 = 400;
const QUICK: Duration = Duration::from_millis(300);
const PATIENT: Duration = Duration::from_secs(5);

/// Receives and behaves until told to finish.
struct Server {
    address: SocketAddr,
    thread: JoinHandle<u64>,
}

impl Server {
    /// `behave` gets the number of the datagram, from 0 on, the datagram, and whom to answer.
    fn start(mut behave: impl FnMut(u64, &[u8], Client<'_>) + Send + 'static) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 512];
            let mut count = 0;
            loop {
                let (length, peer) = socket.recv_from(&mut buffer).unwrap();
                if length == 0 {
                    return count;
                }
                behave(count, &buffer[..length], Client { socket: &socket, peer });
                count += 1;
            }
        });
        Self { address, thread }
    }

    /// Gives the number of datagrams it received.
    fn finish(self) -> u64 {
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(&[], self.address).unwrap();
        self.thread.join().unwrap()
    }
}

struct Client<'a> {
    socket: &'a UdpSocket,
    peer: SocketAddr,
}

impl Client<'_> {
    fn answer(&self, who: &str, datagram: &[u8]) {
        self.socket.send_to(&[who.as_bytes(), b" ", datagram].concat(), self.peer).unwrap();
    }
}

/// Ten flows, in no hurry to give up.
fn ten(address: SocketAddr) -> Spec {
    Spec::new(address).flows(10).rate(2000.0).limit(N).answer_timeout(PATIENT)
}

fn assert_valid(report: &Report) {
    assert!(report.valid(), "{report}");
    let sum = |of: fn(&FlowReport) -> u64| report.flows.iter().map(of).sum::<u64>();
    assert_eq!(sum(|flow| flow.sent), report.sent);
    assert_eq!(sum(|flow| flow.answers), report.answers);
    assert_eq!(sum(|flow| flow.duplicates), report.duplicates);
    assert_eq!(sum(|flow| flow.lost_us.len() as u64), report.lost());
    assert_eq!(sum(|flow| flow.spans.iter().map(|span| span.answers).sum()), report.answers);
}

#[test]
fn a_good_server_answers_every_flow() {
    let server = Server::start(|_, datagram, client| client.answer("3 1 77", datagram));
    let report = run(ten(server.address)).unwrap();
    assert_valid(&report);
    assert_eq!((report.sent, report.answers, report.lost(), server.finish()), (N, N, 0, N));
    assert_eq!((report.moves, report.duplicates, report.wrong, report.refused), (0, 0, 0, 0), "{report}");
    assert_eq!((report.generations[&3].answers, report.generations[&3].seats[&1]), (N, N));
    let sources: BTreeSet<_> = report.flows.iter().map(|flow| flow.source).collect();
    assert_eq!(sources.len(), 10);
    for flow in &report.flows {
        let [span] = flow.spans[..] else { panic!("{flow:?}") };
        assert_eq!((flow.sent, span.answers, span.who.pid, flow.generations()), (40, 40, 77, vec![3]));
        assert_eq!(span.first_us, flow.begun_us);
    }
}

#[test]
fn every_lost_datagram_is_seen_with_its_flow_and_its_time() {
    let dropped = Arc::new(Mutex::new(Vec::new()));
    let book = Arc::clone(&dropped);
    let server = Server::start(move |number, datagram, client| {
        if number % 10 == 3 {
            book.lock().unwrap().push(client.peer);
        } else {
            client.answer("1 0 7", datagram);
        }
    });
    let report = run(ten(server.address).answer_timeout(QUICK)).unwrap();
    assert_valid(&report);
    assert_eq!((report.lost(), report.answers, server.finish()), (N / 10, N - N / 10, N), "{report}");
    for flow in &report.flows {
        let dropped = dropped.lock().unwrap().iter().filter(|peer| **peer == flow.source).count();
        assert_eq!(flow.lost_us.len(), dropped, "{flow:?}");
        assert!(flow.lost_us.iter().all(|at| (flow.begun_us..report.elapsed_us).contains(at)));
    }
    assert_eq!(report.notes.len(), 20);
}

#[test]
fn an_answer_that_is_late_is_no_loss_and_one_too_many_is_told() {
    let mut held = Vec::new();
    let server = Server::start(move |number, datagram, client| {
        // The first hundred are answered with the last one, the second hundred twice.
        match number {
            0..100 => held.push((datagram.to_vec(), client.peer)),
            100..200 => (0..2).for_each(|_| client.answer("1 0 7", datagram)),
            399 => {
                for (datagram, peer) in &held {
                    Client { socket: client.socket, peer: *peer }.answer("1 0 7", datagram);
                }
                client.answer("1 0 7", datagram);
            }
            _ => client.answer("1 0 7", datagram),
        }
    });
    let report = run(ten(server.address)).unwrap();
    assert_valid(&report);
    assert_eq!(
        (report.lost(), report.duplicates, report.answers, server.finish()),
        (0, 100, N, N),
        "{report}"
    );
    assert!(report.latency.max_us > 50_000, "what was held back counts: {report}");
}

#[test]
fn flows_that_move_are_seen_at_the_datagram_that_moved() {
    // Even ports move to the next generation in the middle, and one flow comes back for a datagram.
    let mut sent = BTreeMap::<SocketAddr, u64>::new();
    let server = Server::start(move |_, datagram, client| {
        let count = sent.entry(client.peer).or_default();
        let moves = client.peer.port() % 2 == 0;
        client.answer(if moves && *count >= 20 && *count != 30 { "2 1 8" } else { "1 0 7" }, datagram);
        *count += 1;
    });
    let report = run(ten(server.address)).unwrap();
    server.finish();
    assert_valid(&report);
    for flow in &report.flows {
        let spans: Vec<_> = flow.spans.iter().map(|span| (span.who.generation, span.answers)).collect();
        if flow.source.port() % 2 == 0 {
            assert_eq!(spans, [(1, 20), (2, 10), (1, 1), (2, 9)]);
            assert!(flow.spans.windows(2).all(|pair| pair[0].last_us < pair[1].first_us), "{flow:?}");
        } else {
            assert_eq!(spans, [(1, 40)]);
        }
    }
    let moving = report.flows.iter().filter(|flow| flow.source.port() % 2 == 0).count() as u64;
    assert_eq!((report.moves, report.generations[&1].answers), (moving * 3, N - moving * 19), "{report}");
}

#[test]
fn nobody_there_is_refused_and_lost() {
    let nobody = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let report = run(ten(nobody).limit(40).rate(200.0).answer_timeout(QUICK)).unwrap();
    assert_valid(&report);
    assert_eq!((report.lost(), report.answers), (40, 0), "{report}");
    assert!((20..=40).contains(&report.refused), "{report}");
}

#[test]
fn nonsense_is_no_answer() {
    let server = Server::start(|number, datagram, client| match number % 4 {
        0 => client.answer("1 0", datagram),
        1 => client.answer("1 0 7 0-0", datagram),
        2 => client.answer("1 0 7", b"0-0 0 0"),
        _ => client.answer("1 0 7", &[datagram, b"99999"].concat()),
    });
    let report = run(ten(server.address).answer_timeout(QUICK)).unwrap();
    assert_valid(&report);
    // What the flow has not asked yet, it will never have asked.
    assert_eq!((report.wrong, report.lost(), server.finish()), (N, N, N), "{report}");
}

#[test]
fn what_the_client_itself_drops_makes_the_run_worthless() {
    let server = Server::start(|_, datagram, client| (0..500).for_each(|_| client.answer("1 0 7", datagram)));
    let spec = Spec { receive_buffer: 1, ..ten(server.address).limit(20) };
    let report = run(spec.answer_timeout(QUICK)).unwrap();
    server.finish();
    assert!(report.dropped_here > 0 && !report.valid(), "{report}");
    assert!(report.to_string().contains("NOT VALID"));
}

/// Answers with the generation of the moment.
fn switching() -> (Server, Arc<AtomicU32>) {
    let generation = Arc::new(AtomicU32::new(1));
    let current = Arc::clone(&generation);
    let server = Server::start(move |_, datagram, client| {
        client.answer(&format!("{} 0 7", current.load(Ordering::SeqCst)), datagram);
    });
    (server, generation)
}

#[test]
fn new_flows_know_when_they_began_and_end_when_they_have_lived() {
    let (server, _) = switching();
    let life = Duration::from_millis(100);
    let spec = Spec::new(server.address).flows(2).rate(1000.0).new_flows(50.0).new_life(life);
    let report = run(spec.duration(Duration::from_secs(1))).unwrap();
    assert_valid(&report);
    assert_eq!((report.lost(), report.flows.len(), server.finish()), (0, 52, report.sent), "{report}");
    let late = Duration::from_micros(report.start_lag_max_us) + Duration::from_millis(1);
    for (number, flow) in (0_u32..).zip(&report.flows[2..]) {
        let due = Duration::from_millis(20) * number;
        let begun = Duration::from_micros(flow.begun_us);
        assert!(begun >= due && begun <= due + late, "{number}: {flow:?}");
        assert!(flow.spans[0].last_us - flow.begun_us <= 100_000, "{flow:?}");
    }
    assert!(report.flows[2..].iter().map(|flow| flow.sent).sum::<u64>() > 2 * 50, "they take turns too");
    assert!(report.flows[..2].iter().all(|flow| flow.spans[0].last_us > 900_000));
}

#[test]
fn pausing_flows_are_silent_and_go_on() {
    let heard = Arc::new(Mutex::new(BTreeMap::<SocketAddr, Vec<Duration>>::new()));
    let book = Arc::clone(&heard);
    let start = Instant::now();
    let server = Server::start(move |_, datagram, client| {
        book.lock().unwrap().entry(client.peer).or_default().push(start.elapsed());
        client.answer("1 0 7", datagram);
    });
    let [speak, pause] = [60, 240].map(Duration::from_millis);
    let spec = Spec::new(server.address).flows(4).rate(1000.0).pausing(3, speak, pause);
    let report = run(spec.duration(Duration::from_secs(1))).unwrap();
    server.finish();
    assert_valid(&report);
    let heard = heard.lock().unwrap();
    for flow in &report.flows[..3] {
        let silences = heard[&flow.source].windows(2).filter(|pair| pair[1] - pair[0] > pause * 3 / 4);
        assert!(silences.count() >= 2, "{flow:?}");
        assert!(flow.sent * 2 < report.flows[3].sent, "one that never pauses: {report}");
    }
}

#[test]
fn a_run_can_be_watched_and_marked_and_stopped() {
    let (server, generation) = switching();
    let spec = Spec::new(server.address).flows(5).rate(1000.0).new_flows(100.0);
    let mut running: Running<Report> = spawn(spec).unwrap();
    running.wait_answered(100, PATIENT).unwrap();
    running.mark(2);
    // Flows begun after the mark are answered by the old generation still.
    running.wait_until(PATIENT, |live| live.strays >= 5).unwrap();
    generation.store(2, Ordering::SeqCst);
    running.wait_generation(2, 100, PATIENT).unwrap();
    assert!(matches!(running.wait_generation(9, 1, Duration::ZERO), Err(Error::Deadline { .. })));
    running.stop();
    let report = running.join().unwrap();
    assert_valid(&report);
    assert!(report.strays >= 5 && report.strays < report.generations[&1].answers, "{report}");
    assert_eq!((report.lost(), server.finish()), (0, report.sent));
    assert!(report.generations[&1].last_sent_us < report.generations[&2].last_sent_us);
    assert!(report.generations[&1].last_begun_us < report.generations[&2].last_begun_us);
}

#[test]
fn runs_have_addresses_of_their_own() {
    let (server, _) = switching();
    let ips: BTreeSet<_> =
        (0..3).map(|_| run(ten(server.address).limit(5)).unwrap().flows[0].source.ip()).collect();
    assert_eq!(ips.len(), 3);
    server.finish();
}

#[test]
fn loads_that_are_none_are_refused() {
    let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
    let none = Spec::new(nobody).duration(QUICK);
    let flows = |spec: &Spec| spec.clone().flows(3).rate(9.0);
    let specs = [
        none.clone(),
        none.clone().flows(3),
        none.clone().rate(9.0),
        flows(&none).rate(f64::NAN),
        flows(&none).new_flows(-1.0),
        flows(&none).pausing(4, QUICK, QUICK),
        flows(&none).pausing(1, QUICK, Duration::ZERO),
        Spec { duration: None, ..flows(&none) },
    ];
    for spec in specs {
        assert!(matches!(run(spec.clone()), Err(Error::Spec(_))), "{spec:?}");
    }
}

#[test]
fn the_program_tells_by_its_exit_code() {
    let (server, _) = switching();
    let flows = |arguments: &str| {
        let program = env!("CARGO_BIN_EXE_reuseportd-bench");
        std::process::Command::new(program).arg("flows").args(arguments.split(' ')).output().unwrap()
    };
    let good = flows(&format!("{} --flows 3 --rate 500 --limit 60 --json", server.address));
    let report: Report = serde_json::from_slice(&good.stdout).unwrap();
    assert_eq!((good.status.code(), report.sent, report.flows.len(), server.finish()), (Some(0), 60, 3, 60));
    let nobody = server::bound(0).local_addr().unwrap().as_socket().unwrap();
    let lost = flows(&format!("{nobody} --flows 3 --rate 500 --limit 6 --answer-timeout 100ms"));
    assert_eq!(lost.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&lost.stdout).contains("6 lost"));
    assert_eq!(flows("127.0.0.1:9").status.code(), Some(2));
}
