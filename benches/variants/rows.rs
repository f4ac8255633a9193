//! Rows of the record, and the lines that are printed meanwhile.

use super::loaded::Mode;
use super::measure::lists::Entry;
use super::measure::record::{number, quantile};
use super::measure::rounds::{Cache, Times};
use super::plans::{Variant, What};

/// `benches/README.md` has the columns.
pub const HEADER: &str =
    "gpu,driver,date,commit,command,list,tensors,bytes,dtype,op,change,variant,mode,cache,rounds,calls,\
                          baseline_us,median_us,p10_us,p90_us,ratio,ratio_p10,ratio_p90,spread,\
                          baseline_host_us,host_us,baseline_done_us,done_us,checked,verdict";

/// What is the same in all rows of one measurement. The library was measured first and last in each round.
pub struct Rows<'a> {
    pub run: &'a str,
    pub entry: &'a Entry,
    pub what: What,
    pub mode: Mode,
    pub cache: Cache,
    pub checked: &'static str,
    pub library: [&'a Times; 2],
}

/// Of one variant.
pub struct Row {
    pub csv: String,
    pub line: String,
}

impl Rows<'_> {
    pub fn row(&self, variant: &Variant, prediction: &str, times: &Times) -> Row {
        let [before, after] = self.library;
        let rounds = 0..times.gpu.len();
        let baseline = |round: usize| (before.gpu[round] + after.gpu[round]) / 2.0;
        let ratios: Vec<f64> = rounds.clone().map(|round| times.gpu[round] / baseline(round)).collect();
        // How far two measurements of the same thing are apart, in nine of ten rounds.
        let apart: Vec<f64> = rounds.clone().map(|round| (after.gpu[round] / before.gpu[round] - 1.0).abs()).collect();
        let (ratio, spread) = (quantile(&ratios, 0.5), quantile(&apart, 0.9));
        let baselines: Vec<f64> = rounds.map(baseline).collect();
        let verdict = verdict(ratio, spread);
        let both = |of: fn(&Times) -> &Vec<f64>| [of(before).as_slice(), of(after)].concat();
        let columns = [
            self.run.to_owned(),
            self.entry.list.to_owned(),
            self.entry.numels.len().to_string(),
            self.entry.bytes().to_string(),
            self.entry.dtype.to_owned(),
            self.what.name().to_owned(),
            variant.change.to_owned(),
            variant.name.replace(',', ";"),
            self.mode.name().to_owned(),
            self.cache.name().to_owned(),
            times.gpu.len().to_string(),
            times.calls.to_string(),
            number(quantile(&baselines, 0.5), 3),
            number(quantile(&times.gpu, 0.5), 3),
            number(quantile(&times.gpu, 0.1), 3),
            number(quantile(&times.gpu, 0.9), 3),
            number(ratio, 4),
            number(quantile(&ratios, 0.1), 4),
            number(quantile(&ratios, 0.9), 4),
            number(spread, 4),
            number(quantile(&both(|times| &times.host), 0.5), 2),
            number(quantile(&times.host, 0.5), 2),
            number(quantile(&both(|times| &times.done), 0.5), 2),
            number(quantile(&times.done, 0.5), 2),
            self.checked.to_owned(),
            verdict.to_owned(),
        ];
        let Entry { list, dtype, .. } = self.entry;
        let (what, mode, cache) = (self.what.name(), self.mode.name(), self.cache.name());
        let (ratio, spread) = (number(ratio, 3), number(100.0 * spread, 1));
        let name = variant.name;
        Row {
            csv: columns.join(","),
            line: format!(
                "| {name} | {list} | {dtype} | {what} | {mode}, {cache} | {ratio} | {spread} % | {prediction} | {verdict} |"
            ),
        }
    }
}

pub const TABLE: &str = "| variant | list | dtype | op | how | ratio | spread | prediction | verdict |\n\
                         |---|---|---|---|---|---|---|---|---|";

/// Of a time over the library's, and of how far two of the library's are apart.
pub fn verdict(ratio: f64, spread: f64) -> &'static str {
    if !ratio.is_finite() || !spread.is_finite() {
        "no time"
    } else if ratio < 1.0 - spread {
        "wins"
    } else if ratio > 1.0 + spread {
        "loses"
    } else {
        "within the spread"
    }
}
