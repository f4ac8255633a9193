//! What `benches/gpu.rs` does with its lists: one after the other, or as they are asked for. Rows are written and flushed
//! as they are made, so that what ends the run takes none of them.

use super::attempt::{attempt, Failed};
use super::cases::Op;
use super::lists::{self, share, Entry};
use super::{arena, record, Bench};
use anyhow::{bail, ensure, Context, Result};
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

/// The lists of these indices, until the time is over.
pub fn all(
    bench: &mut Bench,
    entries: &[Entry],
    wanted: &[usize],
    budget: Duration,
    out: &mut impl Write,
) -> Result<()> {
    let started = Instant::now();
    let mut failed = false;
    write_line(out, record::HEADER)?;
    for (done, index) in wanted.iter().enumerate() {
        let entry = &entries[*index];
        let left = budget.saturating_sub(started.elapsed());
        if left.is_zero() || !bench.fits(entry) {
            let why = if left.is_zero() { "the time is over" } else { "it does not fit" };
            eprintln!("SKIPPED {entry}: {why}");
            continue;
        }
        // A third goes to what is not counted: filling, checking, finding the fastest limits.
        let slice = left.mul_f64(share(&wanted[done..]) * 2.0 / 3.0).min(Duration::from_secs(3));
        match attempt(bench, |bench| bench.measure(entry, 1, slice, &mut |row| write_line(out, row))) {
            Ok(()) => eprintln!("{:6.1} s  {entry}", started.elapsed().as_secs_f64()),
            Err(Failed::List(why)) => {
                eprintln!("FAILED {entry}: {why}");
                failed = true;
            }
            Err(Failed::Everything(why)) => bail!("STOPPED at {entry}: {why}"),
        }
    }
    ensure!(!failed, "not all lists could be measured");
    Ok(())
}

/// Answers each request, a line `PASS SECONDS INDEX`, with its rows and a line `done`, or `failed` and why. After a line
/// `stopped`, which says where and why, nothing more is answered, and it returns false.
pub fn serve(bench: &mut Bench, entries: &[Entry], requests: impl BufRead, out: &mut impl Write) -> Result<bool> {
    write_line(out, "ready")?;
    for request in requests.lines() {
        let request = request?;
        let (pass, slice, entry) = match parse(&request, entries) {
            Ok(parsed) => parsed,
            Err(error) => {
                write_line(out, &format!("failed {error:#}"))?;
                continue;
            }
        };
        match attempt(bench, |bench| bench.measure(entry, pass, slice, &mut |row| write_line(out, row))) {
            Ok(()) => write_line(out, "done")?,
            Err(Failed::List(why)) => write_line(out, &format!("failed {}", one_line(&why)))?,
            Err(Failed::Everything(why)) => {
                write_line(out, &format!("stopped at {entry}: {}", one_line(&why)))?;
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// What `torch_gpu.py` takes from here, so that both measure the same.
pub fn exported(entries: &[Entry]) -> serde_json::Value {
    serde_json::json!({
        "header": record::HEADER,
        "align": lists::ALIGN,
        "most_elements": lists::MOST_ELEMENTS_OF_TORCH,
        "sigma": arena::SIGMA,
        "weight": lists::WEIGHT,
        "weighted": lists::WEIGHTED,
        "bounds": Op::ALL.map(|op| (op.name(), op.bound())),
        "lists": entries,
    })
}

fn parse<'a>(request: &str, entries: &'a [Entry]) -> Result<(u32, Duration, &'a Entry)> {
    let mut words = request.split_whitespace();
    let mut word = || words.next().context("a request is PASS SECONDS INDEX");
    let (pass, seconds, index) = (word()?.parse()?, word()?.parse()?, word()?.parse::<usize>()?);
    Ok((pass, Duration::try_from_secs_f64(seconds)?, entries.get(index).context("no such list")?))
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

fn write_line(out: &mut impl Write, line: &str) -> Result<()> {
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
