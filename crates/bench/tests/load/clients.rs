//! Each kind of client behaves as it says, and what the answers tell is read rightly.

use crate::server::{self, BODY, Server};
use reuseportd_bench::{Error, Fate, Kind, Report, Spec, run, spawn};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PATIENT: Duration = Duration::from_secs(10);
const MS: Duration = Duration::from_millis(1);

/// Answers every request until the client leaves.
fn serve(mut stream: TcpStream) {
    while server::request(&mut stream).is_some() {
        server::respond(&mut stream, BODY);
    }
}

fn assert_all_answered(report: &Report) {
    assert_eq!(report.fates.count(Fate::Answered), report.issued, "{report}");
    assert!(report.valid(), "{report}");
}

#[test]
fn all_kinds_together_are_answered_and_counted_as_the_server_counts() {
    let requests = Arc::new(AtomicU64::new(0));
    let tally = Arc::clone(&requests);
    let server = Server::start(move |mut stream| {
        while server::request(&mut stream).is_some() {
            tally.fetch_add(1, Ordering::SeqCst);
            server::respond(&mut stream, BODY);
        }
    });
    let mut spec =
        Spec::new(server.address).rate(500.0).burst(20, 100 * MS).slow(4).half_open(4).keep_alive(3, 10 * MS);
    (spec.poisson, spec.silence, spec.keep_alive_requests) = (true, (20 * MS, 60 * MS), 5);
    let running = spawn(spec).unwrap();
    let kinds = [Kind::New, Kind::Burst, Kind::Slow, Kind::HalfOpen, Kind::KeepAlive];
    running.wait_answered(300, PATIENT).unwrap();
    let report = running.stop_and_join().unwrap();
    assert_all_answered(&report);
    assert_eq!((server.finish(), requests.load(Ordering::SeqCst)), (report.issued, report.answers));
    assert_eq!(report.kinds.keys().copied().collect::<Vec<_>>(), kinds);
    assert!(report.kinds[&Kind::KeepAlive].answers > report.kinds[&Kind::KeepAlive].issued, "{report}");
    assert_eq!((report.generations[&1].answers, report.untagged), (report.answers, 0));
    assert_eq!((report.generations[&1].seats[&0], report.pids[&42]), (report.answers, report.answers));
}

#[test]
fn arrivals_keep_their_rate() {
    let server = Server::start(serve);
    let report = run(Spec::new(server.address).rate(500.0).duration(400 * MS)).unwrap();
    assert_all_answered(&report);
    assert!((199..=201).contains(&report.issued), "{report}");
    assert_eq!(server.finish(), report.issued);
}

#[test]
fn a_stall_of_the_server_shows_in_the_latency_of_all_who_should_have_come_meanwhile() {
    let listener = server::listener(0, 1024);
    let running = spawn(Spec::new(listener.local_addr().unwrap()).rate(100.0).limit(40)).unwrap();
    running.wait_until(PATIENT, |live| live.issued >= 30).unwrap();
    let server = Server::on(listener, serve);
    let report = running.stop_and_join().unwrap();
    server.finish();
    assert_all_answered(&report);
    let latency = report.kinds[&Kind::New].latency;
    assert!(latency.p50_us >= 80_000 && latency.max_us >= 280_000, "{report}");
}

#[test]
fn requests_held_up_by_an_earlier_one_count_from_when_they_were_due() {
    let server = Server::start(|mut stream| {
        server::request(&mut stream).unwrap();
        std::thread::sleep(200 * MS); // the stall to be seen
        server::respond(&mut stream, BODY);
        serve(stream);
    });
    let mut spec = Spec::new(server.address).keep_alive(1, 10 * MS).duration(600 * MS);
    spec.keep_alive_requests = 30;
    let running = spawn(spec).unwrap();
    running.wait_answered(30, PATIENT).unwrap();
    let report = running.stop_and_join().unwrap();
    server.finish();
    // 200, 190, 180 … for the first twenty, not 200 and then nothing.
    assert!(report.kinds[&Kind::KeepAlive].latency.p50_us > 30_000, "{report}");
}

#[test]
fn silent_clients_are_silent_and_slow_ones_send_pieces() {
    let (sender, seen) = channel();
    let sender = Mutex::new(sender);
    let server = Server::start(move |mut stream| {
        let accepted = Instant::now();
        let reads = server::request(&mut stream).unwrap();
        sender.lock().unwrap().send((reads, accepted.elapsed())).unwrap();
        server::respond(&mut stream, BODY);
    });
    for (spec, pieces) in
        [(Spec::new(server.address).half_open(5), false), (Spec::new(server.address).slow(5), true)]
    {
        let mut spec = spec.limit(20);
        spec.silence = (60 * MS, 120 * MS);
        let report = run(spec).unwrap();
        assert_all_answered(&report);
        // Their own silence is no latency.
        assert!(report.kinds.values().all(|part| part.latency.p50_us < 60_000), "{report}");
        let seen: Vec<_> = seen.try_iter().collect();
        // The server's clock starts when it gets round to accepting: allow it some delay.
        assert!(seen.iter().all(|(_, silence)| *silence > 30 * MS), "{seen:?}");
        // Two pieces may be read as one.
        let most = seen.iter().map(|(reads, _)| *reads).max().unwrap();
        assert!(if pieces { (2..=4).contains(&most) } else { most == 1 }, "{seen:?}");
    }
    assert_eq!(server.finish(), 40);
}

#[test]
fn keep_alive_accepts_an_announced_close_and_one_between_requests() {
    let announced = Server::start(|mut stream| {
        server::request(&mut stream).unwrap();
        server::respond(&mut stream, BODY);
        // The load may have stopped between the two.
        if server::request(&mut stream).is_some() {
            write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").unwrap();
        }
    });
    let between = Server::start(|mut stream| {
        server::request(&mut stream).unwrap();
        server::respond(&mut stream, BODY);
    });
    for (server, answers) in [(announced, 2), (between, 1)] {
        let report = run(Spec::new(server.address).keep_alive(2, 20 * MS).limit(6)).unwrap();
        assert_all_answered(&report);
        assert_eq!(server.finish(), 6);
        // The last to come may be between requests when the load stops.
        assert!(report.answers <= 6 * answers && report.answers >= 4 * answers, "{report}");
    }
}

#[test]
fn keep_alive_sees_the_second_request_lost() {
    let ends: [(Fate, fn(TcpStream)); 2] =
        [(Fate::EofBeforeResponse, drop), (Fate::ResetBeforeResponse, server::reset)];
    for (fate, end) in ends {
        let server = Server::start(move |mut stream| {
            server::request(&mut stream).unwrap();
            server::respond(&mut stream, BODY);
            if server::request(&mut stream).is_some() {
                end(stream);
            }
        });
        let running = spawn(Spec::new(server.address).keep_alive(2, 10 * MS)).unwrap();
        running.wait_until(PATIENT, |live| live.fates.count(fate) >= 4).unwrap();
        let report = running.stop_and_join().unwrap();
        assert_eq!(report.lost(), report.fates.count(fate), "{report}");
        assert_eq!((server.finish(), report.answers), (report.issued, report.issued));
    }
}

#[test]
fn echo_is_judged_by_its_text() {
    type Shout = fn(String) -> String;
    let echo = |shout: Shout| {
        Server::start(move |stream| {
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            (&stream).write_all(shout(line).as_bytes()).unwrap();
        })
    };
    let cases: [(Fate, Shout); 4] = [
        (Fate::Answered, |line| line.to_uppercase()),
        (Fate::Wrong, |line| line),
        (Fate::Short, |line| line.trim().to_uppercase()),
        (Fate::EofBeforeResponse, |_| String::new()),
    ];
    for (fate, shout) in cases {
        let server = echo(shout);
        let report = run(Spec::new(server.address).echo().burst(20, PATIENT).limit(20)).unwrap();
        assert_eq!((report.fates.count(fate), server.finish()), (20, 20), "{report}");
    }
}

#[test]
fn an_old_answer_to_a_new_connection_is_a_stray() {
    let generation = Arc::new(AtomicU32::new(1));
    let tag = Arc::clone(&generation);
    let server = Server::start(move |mut stream| {
        server::request(&mut stream).unwrap();
        server::respond(&mut stream, &format!("generation={}\n", tag.load(Ordering::SeqCst)));
    });
    let running = spawn(Spec::new(server.address).rate(500.0)).unwrap();
    running.wait_generation(1, 20, PATIENT).unwrap();
    generation.store(2, Ordering::SeqCst);
    running.mark(2);
    let switched = running.wait_generation(2, 20, PATIENT).unwrap();
    assert_eq!(switched.strays, 0);
    generation.store(1, Ordering::SeqCst);
    running.wait_until(PATIENT, |live| live.strays >= 20).unwrap();
    let report = running.stop_and_join().unwrap();
    server.finish();
    assert_all_answered(&report);
    let [old, new] = [&report.generations[&1], &report.generations[&2]];
    assert!(report.strays >= 20 && report.strays <= old.answers - 20, "{report}");
    assert!(
        old.first_us < new.first_us && new.last_us < old.last_us && old.last_begun_us < old.last_us,
        "{report}"
    );
}

#[test]
fn waiting_ends_at_the_deadline_or_with_the_run() {
    let socket = server::bound(0);
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let running = spawn(Spec::new(address).rate(100.0)).unwrap();
    assert!(matches!(running.wait_answered(1, 50 * MS), Err(Error::Deadline { .. })));
    let live = running.live();
    assert!(live.last_error.unwrap().contains("refused"));
    running.stop_and_join().unwrap();
    let mut running = spawn(Spec::new(address).rate(100.0).limit(3)).unwrap();
    assert!(matches!(running.wait_answered(1, PATIENT), Err(Error::Ended(_))));
    assert_eq!(running.join().unwrap().fates.count(Fate::Refused), 3);
}
