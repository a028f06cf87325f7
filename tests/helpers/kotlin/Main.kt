// Asks the questions of its arguments after the folder and the most tokens; what comes is told to the parent process.
import ai.onnxruntime.Parent
import java.io.File

fun main(arguments: Array<String>) {
    val model = Lawcat(File(arguments[0]))
    for (question in arguments.drop(2)) {
        val answer = StringBuilder()
        model.ask(question, arguments[1].toInt()) { answer.append(it) }
        Parent.to.writeByte('A'.code)
        Parent.writeText(answer.toString())
    }
    model.close()
    Parent.to.flush()
}
