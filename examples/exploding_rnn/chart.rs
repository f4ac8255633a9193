//! The picture: loss on the left, norm of the gradients on the right, every run in it.

use std::fs::File;
use std::io::BufWriter;
use std::ops::Range;
use std::path::Path;

use anyhow::{anyhow, Context};
use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::types::RangedCoordf64;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report;
use crate::train::{Clipping, Run, Setup};

const WIDTH: u32 = 1200;
const HEIGHT: u32 = 700;
/// Drawn this much larger and averaged down, for smooth edges.
const SCALE: u32 = 2;

const INK: RGBColor = RGBColor(40, 44, 52);
const GRID: RGBColor = RGBColor(228, 230, 234);

/// Steps over which the loss is averaged.
const LOSS_WINDOW: usize = 25;
/// Steps over which the largest norm is taken.
const NORM_WINDOW: usize = 10;
/// Norms outside are drawn at the edge: a run that diverges leaves through the top.
const NORM_LIMITS: Range<f64> = 1e-4..1e6;

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Chart<'a, 'b, Y> = ChartContext<'a, BitMapBackend<'b>, Cartesian2d<RangedCoordf64, Y>>;

/// Colours that do not need telling red from green.
fn colour(clipping: Clipping) -> RGBColor {
    match clipping {
        Clipping::Off => RGBColor(213, 94, 0),
        Clipping::Norm(_) | Clipping::NormByCandle(_) => RGBColor(0, 105, 180),
        Clipping::Value(_) => RGBColor(0, 158, 115),
    }
}

/// Length in pixels of the large picture.
const fn px(length: u32) -> u32 {
    length * SCALE
}

fn at(x: u32, y: u32) -> (i32, i32) {
    (px(x) as i32, px(y) as i32)
}

fn text(size: u32, style: FontStyle) -> TextStyle<'static> {
    ("sans-serif", px(size), style).into_font().color(&INK)
}

/// Draws all runs into a PNG file.
pub fn draw(setup: &Setup, runs: &[Run], path: &Path) -> anyhow::Result<()> {
    for (style, font) in [(FontStyle::Normal, dejavu::sans::regular()), (FontStyle::Bold, dejavu::sans::bold())] {
        register_font("sans-serif", style, font).map_err(|_| anyhow!("the embedded font is not readable"))?;
    }
    let kinds: Vec<&[Run]> = runs.chunk_by(|a, b| a.clipping == b.clipping).collect();
    let mut large = vec![255; 3 * (px(WIDTH) * px(HEIGHT)) as usize];
    {
        let root = BitMapBackend::with_buffer(&mut large, (px(WIDTH), px(HEIGHT))).into_drawing_area();
        let (head, body) = root.margin(0, px(10), 0, px(20)).split_vertically(px(80));
        let (left, right) = body.split_horizontally(px(590));
        heading(&head, setup, &kinds)?;
        loss_panel(&left, setup, &kinds)?;
        norm_panels(&right, setup, &kinds)?;
        root.present()?;
    }
    let small = average_down(&large, px(WIDTH) as usize);
    save(&small, path).with_context(|| format!("cannot write {}", path.display()))
}

fn save(rgb: &[u8], path: &Path) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut encoder = png::Encoder::new(BufWriter::new(File::create(path)?), WIDTH, HEIGHT);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_compression(png::Compression::High);
    encoder.set_filter(png::Filter::NoFilter); // half the size of the default for a line drawing
    let mut writer = encoder.write_header()?;
    writer.write_image_data(rgb)?;
    Ok(writer.finish()?)
}

fn heading(area: &Area, setup: &Setup, kinds: &[&[Run]]) -> anyhow::Result<()> {
    let title = "Exploding gradients: a plain recurrent network, clipped and not";
    area.draw_text(title, &text(22, FontStyle::Bold), at(24, 18))?;
    let details = format!(
        "{} task, {} time steps, SGD at learning rate {}; the same {} seeds (weights and data) for each, all shown",
        setup.task.name(),
        setup.length,
        setup.lr,
        kinds[0].len(),
    );
    Ok(area.draw_text(&details, &text(14, FontStyle::Normal), at(24, 52))?)
}

fn loss_panel(area: &Area, setup: &Setup, kinds: &[&[Run]]) -> anyhow::Result<()> {
    let (end, blind) = (setup.steps as f64, setup.task.blind_loss());
    let top = 1.25 * blind;
    let caption = format!("Training loss, mean of {LOSS_WINDOW} steps");
    area.draw_text(&caption, &text(16, FontStyle::Bold), at(24, 4))?;
    let mut chart = ChartBuilder::on(area)
        .margin_top(px(34))
        .margin_left(px(20))
        .margin_right(px(30))
        .x_label_area_size(px(46))
        .y_label_area_size(px(60))
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    let digits = if top < 0.5 { 2 } else { 1 };
    mesh(&mut chart, "step", setup.task.loss_name(), 7, &|y| format!("{y:.digits$}"))?;
    dashed(&mut chart, [(0.0, blind), (end, blind)])?;
    chart.draw_series([Text::new(
        "guessing blindly",
        (0.985 * end, 1.065 * blind),
        text(12, FontStyle::Normal).pos(Pos::new(HPos::Right, VPos::Center)),
    )])?;
    for runs in kinds {
        let colour = colour(runs[0].clipping);
        let line = colour.mix(0.7).stroke_width(px(2));
        for (i, run) in runs.iter().enumerate() {
            let points: Vec<_> = windows(&run.losses, LOSS_WINDOW, mean).map(|(x, y)| (x, y.min(top))).collect();
            if run.diverged.is_some() {
                chart.draw_series(points.last().map(|&end| Cross::new(end, px(6), colour.stroke_width(px(2)))))?;
            }
            let series = chart.draw_series(LineSeries::new(points, line))?;
            if i == 0 {
                series.label(format!("{}: {}", run.clipping.label(), report::outcome(runs))).legend(move |(x, y)| {
                    Rectangle::new([(x, y - px(2) as i32), (x + px(20) as i32, y + px(1) as i32)], colour.filled())
                });
            }
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::Coordinate(px(110) as i32, px(4) as i32))
        .legend_area_size(px(30))
        .margin(px(8))
        .label_font(text(14, FontStyle::Normal))
        .background_style(WHITE.mix(0.9))
        .border_style(GRID)
        .draw()?;
    Ok(())
}

fn norm_panels(area: &Area, setup: &Setup, kinds: &[&[Run]]) -> anyhow::Result<()> {
    let caption = format!("Norm of all gradients before clipping, largest of {NORM_WINDOW} steps");
    area.draw_text(&caption, &text(16, FontStyle::Bold), at(4, 4))?;
    let norms = || kinds.iter().flat_map(|runs| runs.iter()).flat_map(|run| &run.norms).copied().filter(|n| *n > 0.0);
    let low = norms().fold(1.0, f64::min).max(NORM_LIMITS.start).log10().floor();
    let high = norms().fold(1.0, f64::max).min(NORM_LIMITS.end).log10().ceil();
    let (range, end) = (10f64.powf(low)..10f64.powf(high), setup.steps as f64);
    let (_, body) = area.split_vertically(px(30));
    let x_labels = px(46);
    let each = (body.dim_in_pixel().1 - x_labels) / kinds.len() as u32;
    let cuts: Vec<i32> = (1..kinds.len() as u32).map(|i| (i * each) as i32).collect();
    for (i, (runs, part)) in kinds.iter().zip(body.split_by_breakpoints([] as [i32; 0], cuts)).enumerate() {
        let last = i + 1 == kinds.len();
        let mut chart = ChartBuilder::on(&part)
            .margin_top(px(26))
            .x_label_area_size(if last { x_labels } else { 0 })
            .y_label_area_size(px(64))
            .build_cartesian_2d(0.0..end, range.clone().log_scale())?;
        mesh(&mut chart, if last { "step" } else { "" }, "norm", 6, &tick)?;
        let colour = colour(runs[0].clipping);
        let dashes = if matches!(runs[0].clipping, Clipping::Norm(_)) { " (dashed line)" } else { "" };
        let name = runs[0].clipping.label() + dashes;
        part.draw_text(&name, &text(14, FontStyle::Bold).color(&colour), at(68, 6))?;
        for run in *runs {
            let points = windows(&run.norms, NORM_WINDOW, largest).map(|(x, y)| (x, y.clamp(range.start, range.end)));
            chart.draw_series(LineSeries::new(points, colour.mix(0.7).stroke_width(px(1))))?;
        }
        if let Clipping::Norm(max_norm) = runs[0].clipping {
            let height = max_norm.clamp(range.start, range.end);
            dashed(&mut chart, [(0.0, height), (end, height)])?;
        }
    }
    Ok(())
}

/// Grid, axes and their names.
fn mesh<Y>(
    chart: &mut Chart<Y>,
    x_name: &str,
    y_name: &str,
    y_labels: usize,
    y_format: &dyn Fn(&f64) -> String,
) -> anyhow::Result<()>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(x_name).y_desc(y_name).x_labels(6).y_labels(y_labels).max_light_lines(0);
    mesh.bold_line_style(GRID.stroke_width(SCALE)).axis_style(INK.stroke_width(SCALE));
    mesh.label_style(text(13, FontStyle::Normal)).axis_desc_style(text(14, FontStyle::Normal));
    mesh.x_label_formatter(&|x| format!("{x}")).y_label_formatter(y_format);
    Ok(mesh.draw()?)
}

/// A power of ten, written out where that is short.
fn tick(y: &f64) -> String {
    if (1e-3..1e4).contains(y) {
        format!("{y}")
    } else {
        format!("{y:e}")
    }
}

fn dashed<Y: Ranged<ValueType = f64>>(chart: &mut Chart<Y>, line: [(f64, f64); 2]) -> anyhow::Result<()> {
    chart.draw_series(DashedLineSeries::new(line, px(6), px(4), INK.stroke_width(SCALE)))?;
    Ok(())
}

/// Middle of each window of steps, and what `fold` makes of the values in it.
fn windows(values: &[f64], size: usize, fold: fn(&[f64]) -> f64) -> impl Iterator<Item = (f64, f64)> + '_ {
    values.chunks(size).enumerate().map(move |(i, chunk)| ((i * size) as f64 + chunk.len() as f64 / 2.0, fold(chunk)))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// Averages squares of `SCALE` pixels a side; `width` is that of the large picture, three bytes a pixel.
fn average_down(large: &[u8], width: usize) -> Vec<u8> {
    let scale = SCALE as usize;
    let mut small = Vec::with_capacity(large.len() / (scale * scale));
    for rows in large.chunks_exact(3 * width * scale) {
        for column in 0..width / scale {
            for channel in 0..3 {
                let pixel = |i: usize| rows[3 * ((i / scale) * width + column * scale + i % scale) + channel];
                let sum: u32 = (0..scale * scale).map(|i| u32::from(pixel(i))).sum();
                small.push((sum / (SCALE * SCALE)) as u8);
            }
        }
    }
    small
}
