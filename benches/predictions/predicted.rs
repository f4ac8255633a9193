//! `predictions.json`, and what a measurement says of it. Twin: `scripts/predictions.py`, which makes the table in
//! `docs/performance.md`.

use anyhow::Result;
use serde::Deserialize;
use std::collections::HashMap;

#[derive(Deserialize)]
pub struct Predictions {
    cards: HashMap<String, Card>,
    /// Which kernels the crate has, for a norm and for value clipping: keys of each prediction.
    kernels: HashMap<String, String>,
    pub cases: Vec<Predicted>,
}

#[derive(Deserialize)]
struct Card {
    /// As the driver gives it. The whole of it: an H100 PCIe or a part of a GPU is another card.
    name: String,
}

/// One case, by the columns of the record.
#[derive(Deserialize)]
pub struct Predicted {
    pub list: String,
    pub dtype: String,
    pub op: String,
    pub implementation: String,
    pub mode: String,
    pub cache: String,
    #[serde(default)]
    pub unit: Unit,
    /// How far beside the number, or beside the ends of a range, still counts as predicted: a share of it.
    within: f64,
    /// By card, by kernels: a number, or the ends of a range.
    predicted: HashMap<String, HashMap<String, Vec<Option<f64>>>>,
}

/// What is predicted of a case.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Microseconds.
    #[default]
    Us,
    /// The limit's time over the case's.
    Share,
}

/// What still counts as predicted. Without an end on that side, whatever is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    pub low: Option<f64>,
    pub high: Option<f64>,
}

impl Predictions {
    pub fn read() -> Result<Self> {
        Ok(serde_json::from_str(include_str!("predictions.json"))?)
    }

    /// Which prediction of the case is for the kernels that the crate has.
    pub fn kernels(&self, case: &Predicted) -> &str {
        let which = if case.op.starts_with("value") { "value" } else { "norm" };
        self.kernels.get(which).map_or("", String::as_str)
    }

    /// None where nothing is predicted for that card.
    pub fn interval(&self, case: &Predicted, card: &str) -> Option<Interval> {
        let (key, _) = self.cards.iter().find(|(_, known)| known.name == card)?;
        let ends = case.predicted.get(key)?.get(self.kernels(case))?;
        let (low, high) = (*ends.first()?, *ends.last()?);
        Some(Interval {
            low: low.map(|low| low * (1.0 - case.within)),
            high: high.map(|high| high * (1.0 + case.within)),
        })
    }
}

/// A share that is too high is a time that is too short.
pub fn verdict(interval: Option<Interval>, unit: Unit, measured: f64) -> &'static str {
    let Some(Interval { low, high }) = interval else { return "no prediction" };
    if !measured.is_finite() {
        return "no time";
    }
    let [below, above] = match unit {
        Unit::Us => ["refuted: faster", "refuted: slower"],
        Unit::Share => ["refuted: slower", "refuted: faster"],
    };
    if low.is_some_and(|low| measured < low) {
        below
    } else if high.is_some_and(|high| measured > high) {
        above
    } else {
        "confirmed"
    }
}
