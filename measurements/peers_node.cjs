// The network of the npm package @vladmandic/face-api on pictures, run by the package's own code in WebAssembly, one thread.
//
//     node peers_node.cjs PICTURES.json OUTPUT.json [--detect]        (started by peers.py in a folder with node_modules)
//
// PICTURES.json: {"pixels": FILE, "sides": [[height, width], …]}, the pixels RGB, one picture after another. The output has
// a row for each face, {"picture", "box": [left, top, width, height], "shares": {class: probability}}, and the processor's
// seconds for all of them.
const fs = require("fs");
const path = require("path");
const find = (name) => path.dirname(require.resolve(`${name}/package.json`, { paths: [process.cwd()] }));
const tf = require(find("@tensorflow/tfjs"));
const wasm = require(find("@tensorflow/tfjs-backend-wasm"));
const root = find("@vladmandic/face-api");
const faceapi = require(`${root}/dist/face-api.node-wasm.js`);
const { nets } = faceapi;

async function load(net, name) {
  const groups = JSON.parse(fs.readFileSync(`${root}/model/${name}_model-weights_manifest.json`));
  const bytes = new Uint8Array(fs.readFileSync(`${root}/model/${groups[0].paths[0]}`));
  await net.loadFromWeightMap(tf.io.decodeWeights(bytes.buffer, groups.flatMap((group) => group.weights)));
}

async function main([pictures, output, detect]) {
  wasm.setWasmPaths(`${find("@tensorflow/tfjs-backend-wasm")}/dist/`);
  wasm.setThreadsCount(1);
  await tf.setBackend("wasm");
  await load(nets.faceExpressionNet, "face_expression");
  await load(nets.ssdMobilenetv1, "ssd_mobilenetv1");
  await load(nets.faceLandmark68Net, "face_landmark_68");
  const { pixels, sides } = JSON.parse(fs.readFileSync(pictures));
  const file = fs.openSync(pixels);
  const rows = [];
  let microseconds = 0;
  for (const [picture, [height, width]] of sides.entries()) {
    const bytes = new Uint8Array(height * width * 3);
    fs.readSync(file, bytes);
    const began = process.cpuUsage();
    const face = tf.tensor3d(bytes, [height, width, 3], "int32");
    if (detect) {
      for (const found of await faceapi.detectAllFaces(face).withFaceLandmarks().withFaceExpressions()) {
        const { x, y, width, height } = found.detection.box;
        rows.push({ picture, box: [x, y, width, height], shares: found.expressions });
      }
    } else {
      rows.push({ picture, box: [0, 0, width, height], shares: await nets.faceExpressionNet.predictExpressions(face) });
    }
    face.dispose();
    const used = process.cpuUsage(began);
    microseconds += used.user + used.system;
  }
  fs.writeFileSync(output, JSON.stringify({ rows, seconds: microseconds / 1e6 }));
}

main(process.argv.slice(2));
