//! `benches/torch_gpu.py` with the bench's `serve`, and a stand-in for PyTorch: which rows there are and in which order, and
//! what becomes of a list that fails, of a lost GPU and of a bench that is gone.

use super::gpu_bench::measure::{program, Bench};
use super::gpu_bench::{lists, tiny, ILLEGAL_ADDRESS, OUT_OF_MEMORY};
use crate::support::double::{self, Double};
use gradclip::cuda;
use std::io::{BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// What stands for the bench's binary: it passes on what it is asked to a socket of the test.
const RELAY: &str = r#"#!/usr/bin/env python3
import socket, sys, threading
if sys.argv[1] == "--export-lists":
    print(open("LISTS").read())
else:
    test = socket.create_connection(("127.0.0.1", PORT))
    def ask():
        for line in sys.stdin:
            test.sendall(line.encode())
        test.shutdown(socket.SHUT_WR)
    threading.Thread(target=ask, daemon=True).start()
    for line in test.makefile():
        print(line, end="", flush=True)
"#;

fn has_python() -> bool {
    let found = Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        println!("SKIPPED: there is no python3");
    }
    found
}

fn connected(listener: &TcpListener, python: &mut Child) -> Option<TcpStream> {
    listener.set_nonblocking(true).unwrap();
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(60) {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false).unwrap();
            return Some(stream);
        }
        if python.try_wait().unwrap().is_some() {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
    None
}

/// What the script printed and wrote, and whether the bench answered all that was asked.
struct Ran {
    output: Output,
    errors: String,
    rows: Vec<[String; 5]>,
    served: bool,
}

impl Ran {
    /// How many rows of a list and pass have that implementation.
    fn count(&self, list: &str, pass: &str, implementation: &str) -> usize {
        let wanted = [pass, list, implementation];
        self.rows.iter().filter(|[pass, list, _, implementation, _]| [pass, list, implementation] == wanted).count()
    }
}

/// `serves`: how the requests are answered.
fn run(name: &str, environment: &[(&str, &str)], serves: impl FnOnce(TcpStream) -> anyhow::Result<bool>) -> Ran {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("torch_gpu_{name}"));
    fs::create_dir_all(&folder).unwrap();
    let [relay, exported, record] = ["bench", "lists.json", "record.csv"].map(|file| folder.join(file));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    fs::write(&exported, program::exported(&lists()).to_string()).unwrap();
    fs::write(&relay, RELAY.replace("LISTS", exported.to_str().unwrap()).replace("PORT", &port)).unwrap();
    assert!(Command::new("chmod").arg("+x").arg(&relay).status().unwrap().success());

    let mut command = Command::new("python3");
    command.arg(root.join("benches/torch_gpu.py")).args(["--device", "cpu", "--budget", "600", "--max-gib", "0.001"]);
    command.arg("--bench").arg(&relay).arg("--out").arg(&record).envs(environment.iter().copied());
    command.env("PYTHONPATH", root.join("tests/double_suite/torch_stand_in")).env("PYTHONDONTWRITEBYTECODE", "1");
    let mut python = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stream = connected(&listener, &mut python);
    let served = stream.map(serves);
    let output = python.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let served = served.unwrap_or_else(|| panic!("{errors}")).unwrap();
    let text = fs::read_to_string(&record).unwrap();
    let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let columns = lines.next().unwrap();
    let at = |name: &str| columns.iter().position(|column| *column == name).unwrap();
    let wanted = ["pass", "list", "bytes", "implementation", "gpu"].map(at);
    let row = |fields: Vec<&str>| {
        assert_eq!(fields.len(), columns.len(), "{fields:?}");
        wanted.map(|index| fields[index].to_owned())
    };
    Ran { errors, rows: lines.map(row).collect(), served, output }
}

/// With the driver double as it is, or as `before` leaves it once the bench is there.
fn with_bench(double: &Double, name: &str, environment: &[(&str, &str)], before: impl FnOnce(&Double)) -> Ran {
    double.reset();
    let context = cuda::context(0).unwrap();
    let mut bench = Bench::new(&context, tiny()).unwrap();
    before(double);
    run(name, environment, |mut stream| {
        let requests = BufReader::new(stream.try_clone()?);
        let served = program::serve(&mut bench, &lists(), requests, &mut stream);
        stream.shutdown(std::net::Shutdown::Both)?;
        served
    })
}

#[test]
fn both_sides_in_turn() {
    let Some(double) = double::lock() else { return };
    if !has_python() {
        return;
    }
    let ran = with_bench(&double, "turns", &[], |_| {});
    assert!(ran.output.status.success() && ran.served, "{}", ran.errors);
    let entries = lists();
    for entry in &entries {
        for implementation in ["gradclip", "torch", "torch copy", "torch: tch's sequence", "torch: candle's sequence"] {
            let passes = ["1", "2"].map(|pass| ran.count(entry.list, pass, implementation) > 0);
            assert_eq!(passes, [true, implementation == "gradclip"], "{implementation} of {entry}");
        }
        let bytes = entry.bytes().to_string();
        let rows: Vec<_> = ran.rows.iter().filter(|row| row[1] == entry.list).collect();
        assert!(rows.iter().all(|row| row[2] == bytes && row[4] == rows[0][4]), "{rows:?}");
    }
    // gradclip, PyTorch, gradclip, list by list; the sequences when all lists that bars name are done.
    let mut turns: Vec<[&str; 2]> = Vec::new();
    for [pass, list, _, implementation, _] in &ran.rows {
        let side = match implementation.as_str() {
            "torch" | "torch copy" | "torch on one flat buffer" => "torch",
            of if of.contains("sequence") => "sequences",
            _ => pass,
        };
        if turns.last() != Some(&[list, side]) {
            turns.push([list, side]);
        }
    }
    let lists = entries.each_ref().map(|entry| entry.list);
    let expected = lists.iter().flat_map(|list| ["1", "torch", "2"].map(|side| [*list, side]));
    assert_eq!(turns, expected.chain(lists.iter().map(|list| [*list, "sequences"])).collect::<Vec<_>>());
}

#[test]
fn what_fails_is_named_and_takes_nothing_else() {
    let Some(double) = double::lock() else { return };
    if !has_python() {
        return;
    }
    // One list of gradclip's.
    let ran = with_bench(&double, "list", &[], |double| double.fail_named("cuMemcpyHtoDAsync_v2", 0, OUT_OF_MEMORY));
    assert_eq!(ran.output.status.code(), Some(1), "{}", ran.errors);
    assert!(ran.served && ran.errors.contains("FAILED several f32: "), "{}", ran.errors);
    assert_eq!((ran.count("several", "1", "gradclip"), ran.count("off by one", "1", "torch") > 0), (0, true));

    // One of PyTorch's, whose message has two lines.
    let ran = with_bench(&double, "torch", &[("STAND_IN_FAILS_ON", "2")], |_| {});
    assert_eq!(ran.output.status.code(), Some(1), "{}", ran.errors);
    assert!(ran.errors.contains("FAILED off by one bf16 with torch: out of memory\n"), "{}", ran.errors);
    assert!(ran.count("off by one", "2", "gradclip") > 0 && ran.count("a table in memory", "1", "torch") > 0);

    // The GPU, in the first kernel after the first list's 24 launches or more of limits: it is said once.
    let ran = with_bench(&double, "lost", &[], |double| double.crash_kernel(30, ILLEGAL_ADDRESS));
    assert_eq!(ran.output.status.code(), Some(1), "{}", ran.errors);
    assert!(!ran.served && ran.errors.contains("STOPPED: stopped at several f32: "), "{}", ran.errors);
    assert_eq!(ran.errors.matches("ILLEGAL_ADDRESS").count(), 1, "{}", ran.errors);
    assert!(!ran.errors.contains("off by one"), "{}", ran.errors);

    // The process, in the middle of a row: the rows that were whole are there.
    let ran = run("gone", &[], |mut stream| {
        let row = vec!["x"; super::gpu_bench::measure::record::HEADER.split(',').count()].join(",");
        writeln!(stream, "ready\n{row}")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        Ok(true)
    });
    assert_eq!(ran.output.status.code(), Some(1), "{}", ran.errors);
    assert!(ran.errors.contains("has ended while it measured several f32"), "{}", ran.errors);
    assert_eq!(ran.rows.len(), 1);
}
